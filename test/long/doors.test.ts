import { DoorFuzz, FUZZED_DOORS } from '../support/door-fuzz.js';

describe('I-10 a hundred thousand messages through each door', function () {
  this.timeout(3_600_000);
  let fuzz: DoorFuzz;
  before(async () => {
    fuzz = await DoorFuzz.create();
  });
  after(() => fuzz?.destroy());

  for (const door of FUZZED_DOORS) it(door, () => fuzz.run(door, 100_000));
});
