import type { MigrateMode } from 'vtpm-proto';
import { ToolstackError } from '../../error.js';
import type { Context } from '../context.js';
import { EXIT } from '../exit-status.js';
import { findPeer, makeOrder } from '../migration/order.js';
import { duration, type MigrateProgress, type ProgressView, progressView } from '../migration/progress.js';
import { RunningMigration } from '../migration/run.js';
import { bytes, fields } from '../output.js';
import { readToolstackKey } from '../toolstack-key.js';

export interface MigrateFlags {
  readonly to?: string;
  readonly dryRun?: boolean;
  readonly offline?: boolean;
  readonly live?: boolean;
  readonly timeout?: string;
}

/**
 * Moves one vTPM to another host, and shows how far it is. Interrupted, it cancels where that is still possible.
 * @returns the exit status: 0 only where it has moved, or where a dry run found nothing in the way
 */
export async function migrate(
  nameOrId: string | undefined,
  flags: MigrateFlags,
  context: Context,
): Promise<number> {
  const { configuration, output, supervisor } = context;
  if (nameOrId === undefined || flags.to === undefined) {
    throw new ToolstackError(
      'usage',
      'a migration takes the name of a vTPM and --to, the name of a peer: vtpmctl peer list shows them',
    );
  }
  if (flags.offline && flags.live) throw new ToolstackError('usage', 'it is either --offline or --live');
  const timeoutSeconds = secondsOf(flags.timeout);
  const isDryRun = flags.dryRun === true;
  const key = readToolstackKey(configuration.paths);
  const vtpm = await supervisor.vtpm(nameOrId);
  const peer = await findPeer(flags.to, context);
  const mode = flags.offline ? 'OFFLINE' : flags.live ? 'LIVE' : undefined;
  const order = await makeOrder(key, vtpm, peer, { isDryRun, mode, timeoutSeconds }, context);
  const view: ProgressView = output.isJson
    ? {
        show: (progress) => output.line({ vtpm: vtpm.id, name: vtpm.name, ...progress }, ''),
        say: (text) => output.note(text),
        end: () => undefined,
      }
    : progressView(vtpm.name, process.stderr);
  const running = new RunningMigration(supervisor, vtpm, view.say);
  const interrupt = (): void => running.interrupt();
  process.on('SIGINT', interrupt);
  const timer =
    timeoutSeconds === undefined ? undefined : setTimeout(() => running.cancel(), timeoutSeconds * 1000);
  try {
    const show = (progress: MigrateProgress): void => {
      view.show(progress);
      const isItsTurn = progress.phase === 'PREPARED' && order.mode === 'VMM' && !isDryRun;
      if (isItsTurn)
        view.say(`${vtpm.name} waits for its VM: migrate that now, to ${peer.name}; Ctrl-C cancels`);
    };
    const end = await running.run(order.bytes, isDryRun, show);
    view.end();
    return report(vtpm, peer.name, withoutStop(end, order.mode), isDryRun, context);
  } catch (error) {
    view.end();
    throw error;
  } finally {
    clearTimeout(timer);
    process.removeListener('SIGINT', interrupt);
  }
}

function report(
  { id, name }: { readonly id: string; readonly name: string },
  peer: string,
  end: MigrateProgress,
  isDryRun: boolean,
  { output }: Context,
): number {
  const { elapsedUs, downtimeUs, bytesSent, reason, message, checks } = end;
  const result = resultOf(end, isDryRun);
  const value = { vtpm: id, name, peer, result, elapsedUs, downtimeUs, bytes: bytesSent, reason, message };
  const took = `in ${duration(elapsedUs)}`;
  const checked = checks.length === 0 ? '' : `${fields(checks.map((check) => [check.name, check.detail]))}\n`;
  const text = {
    migrated: `${name} lives on ${peer} now: ${took}, ${downtimeUs > 0 ? `stopped for ${duration(downtimeUs)}, ` : ''}${bytes(bytesSent)}`,
    possible: `${checked}${name} can go to ${peer}: checked ${took}, nothing was stopped`,
    'not-migrated': `${checked}${name} stays here: ${because(end)}${downtimeUs > 0 ? `; it was stopped for ${duration(downtimeUs)}` : ''}`,
    'in-doubt': `${name} is in doubt: ${because(end)}. Nobody runs it until ${peer} says what it decided; to ask: vtpmctl migrate resolve ${name}`,
  }[result];
  output.line(isDryRun ? { ...value, checks } : value, text);
  return result === 'migrated' || result === 'possible' ? EXIT.ok : EXIT.failed;
}

function resultOf({ phase }: MigrateProgress, isDryRun: boolean) {
  if (phase === 'COMMITTED') return 'migrated';
  if (phase === 'IN_DOUBT') return 'in-doubt';
  return isDryRun && phase === 'PREPARED' ? 'possible' : 'not-migrated';
}

/** One that was stopped before was not stopped by it. */
export function withoutStop(end: MigrateProgress, mode: MigrateMode): MigrateProgress {
  return mode === 'OFFLINE' ? { ...end, downtimeUs: 0 } : end;
}

/** The reason as a sentence, and by name for who looks it up. */
export function because({ reason, message }: Pick<MigrateProgress, 'reason' | 'message'>): string {
  const said = message === '' ? 'no reason was given' : message.replace(/\.$/, '');
  return reason === '' ? said : `${said} (${reason})`;
}

/** @throws ToolstackError `usage` */
export function secondsOf(text: string | undefined): number | undefined {
  if (text === undefined) return undefined;
  if (/^\d{1,5}$/.test(text) && Number(text) > 0) return Number(text);
  throw new ToolstackError('usage', `--timeout is a number of seconds, at least 1, not "${text}"`);
}
