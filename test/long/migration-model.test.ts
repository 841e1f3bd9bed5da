import { checkMigrationModel } from '../manager/migration-model.js';

describe('a vTPM over three hosts that are killed at any step, long', () => {
  it('I-3 I-5 has one owner at most in 5000 lives', async function () {
    this.timeout(1_800_000);
    await checkMigrationModel(5000);
  });
});
