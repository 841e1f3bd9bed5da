import { checkMigrationModel } from './migration-model.js';

describe('a vTPM over three hosts that are killed at any step', () => {
  it('I-3 I-5 has one owner at most, is never lost, and goes back neither in epoch nor in generation', () =>
    checkMigrationModel(60));
});
