import { randomInt } from 'node:crypto';
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { type CrashPoint, MIGRATION_BARRIERS } from 'vtpm-manager/migration/machine';
import { REPOSITORY } from './installation.js';
import { type MigrationFault, VICTIMS, type Victim } from './migration-crash-rig.js';

type Point = Pick<MigrationFault, 'side' | 'daemon' | 'barrier' | 'before'>;

/** What has to fail before a migration comes to a state of which an undisturbed one knows nothing. */
const BEFORE: Readonly<Record<string, MigrationFault>> = {
  thawing: at('source', 'migrate.source.freeze', ['source worker']),
  asking: at('destination', 'migrate.destination.commit', ['destination manager']),
  inquired: at('destination', 'migrate.destination.commit', ['destination manager']),
};
/** Points that are within a step of the state machines, by the file that has them. */
const WITHIN = [
  { daemon: 'supervisor', directory: 'toolstack/src/supervisor' },
  { daemon: 'manager', directory: 'manager/src/ownership' },
] as const;
/** The source's among those of the manager's records; the others are the destination's. */
const OF_SOURCE = /^migrate\.(source|suspend|depart|thaw|moved|stay)/;

/** Each point of either side, with each thing that can fail there. */
export function singleFaults(): MigrationFault[] {
  return points().flatMap((point) => VICTIMS.map((victim) => ({ ...point, victims: [victim] })));
}

/** Two that fail at once at a random point. */
export function doubleFaults(count: number): MigrationFault[] {
  const all = points();
  return Array.from({ length: count }, () => {
    const point = all[randomInt(all.length)] as Point;
    const first = randomInt(VICTIMS.length);
    const second = (first + 1 + randomInt(VICTIMS.length - 1)) % VICTIMS.length;
    return { ...point, victims: [VICTIMS[first] as Victim, VICTIMS[second] as Victim] };
  });
}

/** As many, spread over all single ones, from a random one on. */
export function sampleFaults(count: number): MigrationFault[] {
  const all = singleFaults();
  const start = randomInt(all.length);
  // A step that shares no factor with the number of victims comes to all of them.
  const step = Math.floor(all.length / count / VICTIMS.length) * VICTIMS.length + 1;
  return Array.from(
    { length: count },
    (_, index) => all[(start + index * step) % all.length] as MigrationFault,
  );
}

/** Of a live migration, each once. */
export function points(): Point[] {
  const ofMachines = MIGRATION_BARRIERS.filter(({ modes }) => modes.includes('LIVE')).map(pointOf);
  return [...ofMachines, ...WITHIN.flatMap(pointsIn)];
}

function pointOf({ name, side, state }: CrashPoint): Point {
  const before = BEFORE[state];
  return { side, daemon: 'manager', barrier: name, ...(before && { before }) };
}

function pointsIn({ daemon, directory }: (typeof WITHIN)[number]): Point[] {
  const path = join(REPOSITORY, directory);
  const files = readdirSync(path, { recursive: true, encoding: 'utf8' }).filter((name) =>
    name.endsWith('.ts'),
  );
  const text = files.map((name) => readFileSync(join(path, name), 'utf8')).join('');
  const names = new Set(
    [...text.matchAll(/\bbarrier\('(migrate\.[\w.-]+)'\)/g)].map(([, name]) => name as string),
  );
  return [...names].map((barrier) => {
    const side = OF_SOURCE.test(barrier) ? 'source' : 'destination';
    const before = barrier.startsWith('migrate.abort') ? BEFORE.inquired : undefined;
    return { side, daemon, barrier, ...(before && { before }) };
  });
}

function at(side: 'source' | 'destination', barrier: string, victims: readonly Victim[]): MigrationFault {
  return { side, daemon: 'manager', barrier, victims };
}
