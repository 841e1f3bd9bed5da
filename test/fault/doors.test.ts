import { DoorFuzz, FUZZED_DOORS } from '../support/door-fuzz.js';

/** A sample of the hundred thousand messages of the long run. */
describe('I-10 whatever comes through a door is answered or ends its connection, and nobody else notices', () => {
  let fuzz: DoorFuzz;
  before(async () => {
    fuzz = await DoorFuzz.create();
  });
  after(() => fuzz?.destroy());

  for (const door of FUZZED_DOORS) it(door, () => fuzz.run(door, 600));
});
