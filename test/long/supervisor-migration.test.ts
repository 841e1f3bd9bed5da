import { MIGRATION_BARRIERS } from 'vtpm-toolstack/supervisor/migration/barriers';
import { type MigrationWorld, withMigrationWorlds } from '../toolstack/migration-world.js';

describe("I-3: a supervisor that is killed in a migration does what the manager's record says", function () {
  this.timeout(60_000);
  let world: MigrationWorld;
  withMigrationWorlds((made) => {
    world = made;
  });

  for (const { side, name } of MIGRATION_BARRIERS) {
    for (const verdict of ['COMMIT', 'ABORT'] as const) {
      // Behind the manager's grant there is one verdict.
      const isDecided = name.endsWith('serving') || name.endsWith('shown');
      if (isDecided && verdict === 'ABORT') continue;
      it(`${name}: ${verdict}`, () =>
        side === 'source' ? world.killDeparting(name, verdict) : world.killArriving(name, verdict));
    }
  }
});
