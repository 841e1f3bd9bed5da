import { randomInt } from 'node:crypto';
import { type CrashPoint, MIGRATION_BARRIERS } from 'vtpm-manager/migration/machine';
import { type MigrationFault, VICTIMS, type Victim } from './migration-crash-rig.js';

/** What has to fail before a migration comes to a state of which an undisturbed one knows nothing. */
const BEFORE: Readonly<Record<string, MigrationFault>> = {
  thawing: at('source', 'migrate.source.freeze', ['source worker']),
  asking: at('destination', 'migrate.destination.commit', ['destination manager']),
  inquired: at('destination', 'migrate.destination.commit', ['destination manager']),
};

/** Each point of either state machine, with each thing that can fail there. */
export function singleFaults(): MigrationFault[] {
  return points().flatMap((point) => VICTIMS.map((victim) => faultAt(point, [victim])));
}

/** Two that fail at once at a random point. */
export function doubleFaults(count: number): MigrationFault[] {
  const all = points();
  return Array.from({ length: count }, () => {
    const point = all[randomInt(all.length)] as CrashPoint;
    const first = randomInt(VICTIMS.length);
    const second = (first + 1 + randomInt(VICTIMS.length - 1)) % VICTIMS.length;
    return faultAt(point, [VICTIMS[first] as Victim, VICTIMS[second] as Victim]);
  });
}

/** As many, spread over all single ones, from a random one on. */
export function sampleFaults(count: number): MigrationFault[] {
  const all = singleFaults();
  const start = randomInt(all.length);
  // A step that shares no factor with the number of victims comes to all of them.
  const step = Math.floor(all.length / count) | 1;
  return Array.from(
    { length: count },
    (_, index) => all[(start + index * step) % all.length] as MigrationFault,
  );
}

function points(): CrashPoint[] {
  return MIGRATION_BARRIERS.filter(({ modes }) => modes.includes('LIVE'));
}

function faultAt({ name, side, state }: CrashPoint, victims: readonly Victim[]): MigrationFault {
  const before = BEFORE[state];
  return { ...at(side, name, victims), ...(before && { before }) };
}

function at(side: 'source' | 'destination', barrier: string, victims: readonly Victim[]): MigrationFault {
  return { side, daemon: 'manager', barrier, victims };
}
