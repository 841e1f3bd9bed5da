import { ToolstackError } from '../../error.js';
import { inParallel } from '../../supervisor/in-parallel.js';
import type { Context } from '../context.js';
import { EXIT } from '../exit-status.js';
import { findPeer, makeOrder } from '../migration/order.js';
import { duration, type MigrateProgress } from '../migration/progress.js';
import { RunningMigration } from '../migration/run.js';
import { bytes, fields, type Output } from '../output.js';
import type { ManagerPeer } from '../peer-api.js';
import type { SupervisorVtpm } from '../supervisor-api.js';
import { readToolstackKey } from '../toolstack-key.js';
import { because, withoutStop } from './migrate.js';

export interface EvacuateFlags {
  readonly to: string;
  readonly parallel: string;
  readonly only?: readonly string[];
  readonly dryRun?: boolean;
}

const MAX_PARALLEL = 64;
/** In a message. */
const SHOWN_NAMES = 20;

/** What came of one vTPM. */
interface Outcome {
  readonly vtpm: string;
  readonly name: string;
  /** `possible`: of a dry run. */
  readonly result: 'migrated' | 'possible' | 'not-migrated' | 'in-doubt' | 'left';
  readonly reason: string;
  readonly message: string;
  readonly downtimeUs: number;
  readonly elapsedUs: number;
  readonly bytes: number;
}

/**
 * Moves every vTPM, or those whose names fit, some at a time. What one of them is refused for does not stop the others.
 * Interrupted, it begins no other and cancels those that can still be cancelled.
 * @returns the exit status: 0 only where all of them have moved, or could
 * @throws ToolstackError `unknown-vtpm` where a name is asked for that none has
 */
export async function evacuate(flags: EvacuateFlags, context: Context): Promise<number> {
  const { configuration, output, supervisor } = context;
  const parallel = parallelOf(flags.parallel);
  const key = readToolstackKey(configuration.paths);
  const peer = await findPeer(flags.to, context);
  const vtpms = chosen(await supervisor.vtpms(), flags, output);
  const isDryRun = flags.dryRun === true;
  const running = new Set<RunningMigration>();
  let isInterrupted = false;
  const interrupt = (): void => {
    if (!isInterrupted) output.note('interrupted: no other vTPM is begun, and those under way are cancelled');
    isInterrupted = true;
    for (const migration of running) migration.interrupt();
  };
  process.on('SIGINT', interrupt);
  const began = performance.now();
  const outcomes: Outcome[] = [];
  try {
    await inParallel(parallel, vtpms, async (vtpm) => {
      const migration = new RunningMigration(supervisor, vtpm, (text) => output.note(text));
      const one = async (): Promise<MigrateProgress> => {
        const options = { isDryRun, mode: undefined, timeoutSeconds: undefined };
        // As it is at its turn, which may be long after the list was asked for.
        const now = await supervisor.vtpm(vtpm.id);
        const order = await makeOrder(key, now, peer, options, context);
        running.add(migration);
        if (isInterrupted) throw left();
        const end = await migration.run(order.bytes, isDryRun, ({ phase }) => {
          if (phase !== 'PREPARED' || order.mode !== 'VMM' || isDryRun) return;
          output.note(`${vtpm.name} waits for its VM: migrate that now, to ${peer.name}`);
        });
        return withoutStop(end, order.mode);
      };
      const outcome = isInterrupted
        ? failureOf(vtpm, left())
        : await one().then(
            (end) => outcomeOf(vtpm, end),
            (error) => failureOf(vtpm, ToolstackError.from(error)),
          );
      running.delete(migration);
      outcomes.push(outcome);
      output.line(outcome, sayOutcome(outcome, outcomes.length, vtpms.length));
    });
  } finally {
    process.removeListener('SIGINT', interrupt);
  }
  return report(outcomes, peer, isDryRun, (performance.now() - began) * 1000, output);
}

function left(): ToolstackError {
  return new ToolstackError('busy', LEFT);
}
const LEFT = 'it was not begun';

function outcomeOf({ id, name }: SupervisorVtpm, end: MigrateProgress): Outcome {
  const { phase, reason, message, downtimeUs, elapsedUs, bytesSent } = end;
  const result =
    phase === 'COMMITTED'
      ? 'migrated'
      : phase === 'IN_DOUBT'
        ? 'in-doubt'
        : phase === 'ABORTED'
          ? 'not-migrated'
          : 'possible';
  return { vtpm: id, name, result, reason, message, downtimeUs, elapsedUs, bytes: bytesSent };
}

function failureOf({ id, name }: SupervisorVtpm, { code, message }: ToolstackError): Outcome {
  const result = message === LEFT ? 'left' : code === 'in-doubt' ? 'in-doubt' : 'not-migrated';
  return { vtpm: id, name, result, reason: code, message, downtimeUs: 0, elapsedUs: 0, bytes: 0 };
}

function sayOutcome(outcome: Outcome, index: number, count: number): string {
  const { name, result, downtimeUs, elapsedUs, bytes: size } = outcome;
  const head = `${String(index).padStart(String(count).length)}/${count} ${result.padEnd(12)} ${name}`;
  if (result === 'migrated') {
    const stop = downtimeUs > 0 ? `, stopped for ${duration(downtimeUs)}` : '';
    return `${head}: ${duration(elapsedUs)}${stop}, ${bytes(size)}`;
  }
  return result === 'possible' ? head : `${head}: ${because(outcome)}`;
}

function report(
  outcomes: readonly Outcome[],
  peer: ManagerPeer,
  isDryRun: boolean,
  elapsedUs: number,
  output: Output,
): number {
  const done = outcomes.filter(({ result }) => result === 'migrated' || result === 'possible');
  const failures = new Map<string, string[]>();
  for (const { name, result, reason } of outcomes) {
    if (result === 'migrated' || result === 'possible') continue;
    const why = result === 'left' ? 'not begun' : reason === '' ? result : reason;
    failures.set(why, [...(failures.get(why) ?? []), name]);
  }
  const stopped = done.map(({ downtimeUs }) => downtimeUs).filter((downtime) => downtime > 0);
  const total = outcomes.reduce((sum, outcome) => sum + outcome.bytes, 0);
  const summary = {
    peer: peer.name,
    dryRun: isDryRun,
    vtpms: outcomes.length,
    [isDryRun ? 'possible' : 'done']: done.length,
    failures: Object.fromEntries(failures),
    elapsedUs: Math.round(elapsedUs),
    worstDowntimeUs: stopped.length === 0 ? null : Math.max(...stopped),
    bytes: total,
  };
  output.line(
    { summary },
    fields([
      isDryRun
        ? ['checked', `${done.length} of ${outcomes.length} can go to ${peer.name}; nothing was stopped`]
        : ['done', `${done.length} of ${outcomes.length} to ${peer.name}`],
      ...[...failures].map(([why, names]) => [why, names.join(', ')] as const),
      ['time', duration(elapsedUs)],
      ['longest stop', stopped.length === 0 ? null : duration(Math.max(...stopped))],
      ['bytes', total === 0 ? null : bytes(total)],
    ]),
  );
  return done.length === outcomes.length ? EXIT.ok : EXIT.failed;
}

/**
 * Those that are elsewhere, or on their way, are nobody's business any more.
 * @throws ToolstackError `unknown-vtpm` where none is called so, and none was
 */
function chosen(vtpms: readonly SupervisorVtpm[], { only }: EvacuateFlags, output: Output): SupervisorVtpm[] {
  const isHere = ({ state }: SupervisorVtpm): boolean =>
    state !== 'moved' && state !== 'migrating' && state !== 'arriving';
  const fits = (glob: string) => {
    const pattern = globPattern(glob);
    return ({ name }: SupervisorVtpm): boolean => pattern.test(name);
  };
  const strange = (only ?? []).filter((glob) => !vtpms.some(fits(glob)));
  if (strange.length > 0 && strange.length === only?.length) {
    throw new ToolstackError(
      'unknown-vtpm',
      `no vTPM here is called ${strange.join(' or ')}; ${namesOf(vtpms.filter(isHere))}`,
    );
  }
  for (const glob of strange) output.note(`no vTPM here is called ${glob}`);
  const found = vtpms.filter((vtpm) => isHere(vtpm) && (only ?? ['*']).some((glob) => fits(glob)(vtpm)));
  if (found.length === 0) output.note('none of them is here to go; vtpmctl list shows where each is');
  return found;
}

function namesOf(vtpms: readonly SupervisorVtpm[]): string {
  const names = vtpms.slice(0, SHOWN_NAMES).map(({ name }) => name);
  if (vtpms.length > names.length) names.push(`… (${vtpms.length} in all, see vtpmctl list)`);
  return names.length === 0 ? 'there is none that could go' : `there are: ${names.join(', ')}`;
}

/** `*` stands for any characters, `?` for one, everything else for itself. */
export function globPattern(glob: string): RegExp {
  const source = glob.replace(/[\\^$.*+?()[\]{}|]/g, (found) =>
    found === '*' ? '.*' : found === '?' ? '.' : `\\${found}`,
  );
  return new RegExp(`^${source}$`);
}

function parallelOf(text: string): number {
  if (/^\d{1,2}$/.test(text) && Number(text) >= 1 && Number(text) <= MAX_PARALLEL) return Number(text);
  throw new ToolstackError('usage', `--parallel is a number from 1 to ${MAX_PARALLEL}, not "${text}"`);
}
