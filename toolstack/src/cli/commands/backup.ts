import { existsSync } from 'node:fs';
import { resolve } from 'node:path';
import { privateDirectory, writeFileDurably } from 'vtpm-common';
import { ToolstackError } from '../../error.js';
import type { Context } from '../context.js';
import { EXIT } from '../exit-status.js';
import { sayGeneration } from '../generation.js';
import { isUuid } from '../inventory.js';
import { runManagerCommand } from '../manager-command.js';
import { bytes, fields, table, time } from '../output.js';
import { makeToolstackKey } from '../toolstack-key.js';

export interface BackupFlags {
  readonly to?: string;
  readonly output?: string;
}

export interface RestoreFlags {
  readonly key: string;
  readonly acceptRollback?: boolean;
}

export interface RebuildFlags extends RestoreFlags {
  readonly recoveryKeyFile?: string;
}

/** The private half goes to the file alone. */
export async function keygen(
  { output: file }: { readonly output: string },
  { configuration, output }: Context,
): Promise<void> {
  const args = ['backup-keygen', '--output', resolve(file)];
  const made = await runManagerCommand<{ file: string; public: string }>(configuration.paths, args);
  output.result(
    made,
    `${fields([
      ['private', `${made.file}; keep it away from this host, nothing else opens the backups`],
      ['public', made.public],
    ])}\nnext: vtpmctl backup --to ${made.public} -o FILE`,
  );
}

interface BackupResult {
  readonly file: string;
  readonly backup: string;
  readonly vtpms: number;
  readonly bytes: number;
}

export async function backup(names: readonly string[], flags: BackupFlags, context: Context): Promise<void> {
  const { configuration, output, manager } = context;
  if (flags.to === undefined || flags.output === undefined) {
    throw new ToolstackError(
      'usage',
      'a backup takes --to, the public half of a key that vtpmctl backup keygen made, and --output',
    );
  }
  await manager.health();
  const ids = await idsOf(names, context);
  const args = ['backup', ...ids, '--to', flags.to, '--output', resolve(flags.output)];
  const made = await runManagerCommand<BackupResult>(configuration.paths, args);
  output.result(
    made,
    fields([
      ['written', made.file],
      ['backup', made.backup],
      ['vTPMs', made.vtpms],
      ['size', bytes(made.bytes)],
    ]),
  );
}

interface Restored {
  readonly isDone: boolean;
  readonly vtpms: readonly {
    readonly id: string;
    readonly action: 'restore' | 'retire' | 'nothing' | 'refused';
    readonly from?: number | null;
    readonly to?: number;
    readonly next?: number | null;
    readonly savedAt?: number;
    readonly reason?: { readonly code: string; readonly message: string };
  }[];
}

/** @returns the exit status: 0 only where all of it was done */
export async function restore(
  file: string,
  names: readonly string[],
  flags: RestoreFlags,
  context: Context,
): Promise<number> {
  const { configuration, output, manager } = context;
  await manager.health();
  const ids = await idsOf(names, context);
  const args = [
    ...['restore', resolve(file), ...ids, '--key-file', resolve(flags.key)],
    ...(flags.acceptRollback === true ? ['--accept-rollback'] : []),
  ];
  const result = await runManagerCommand<Restored>(configuration.paths, args);
  const lines = result.vtpms.map((vtpm) => describe(vtpm, result.isDone));
  if (!result.isDone) lines.push('nothing was changed; to do it add --accept-rollback');
  output.result(result, lines.join('\n'));
  const isRefused = result.vtpms.some(({ action }) => action === 'refused');
  return result.isDone && !isRefused ? EXIT.ok : EXIT.failed;
}

function describe(vtpm: Restored['vtpms'][number], isDone: boolean): string {
  const { id, action, from, to, next, savedAt, reason } = vtpm;
  if (action === 'refused') return `refused    ${id}: ${reason?.message}`;
  if (action === 'nothing') return `unchanged  ${id}: it is as the backup says, or has no state there`;
  if (action === 'retire')
    return `${isDone ? 'retired' : 'retires'}    ${id}: the backup says that it was, or had moved away`;
  const saved = savedAt ? ` (saved ${time(new Date(savedAt).toISOString())})` : '';
  const before = from === null ? 'is not here' : `is at generation ${say(from)}`;
  return isDone
    ? `restored   ${id} ${from === null ? '' : `from generation ${say(from)} `}to ${say(to)}${saved}; goes on with ${say(next)}`
    : `goes back  ${id} ${before}, the backup has ${say(to)}${saved}`;
}

function say(generation: number | null | undefined): string {
  return generation == null ? '-' : sayGeneration(generation);
}

interface Rebuilt {
  readonly managerId: string;
  readonly storeId: string;
  readonly tpm: { readonly kind: string; readonly path: string };
  readonly pcrSelection: string;
  readonly vtpms: readonly { readonly id: string; readonly kind: string; readonly generation: number }[];
  readonly needsRecover: boolean;
}

/** A new toolstack key too: the old one was on the disk. */
export async function rebuild(
  file: string,
  flags: RebuildFlags,
  { configuration, output }: Context,
): Promise<void> {
  const { paths } = configuration;
  if (flags.acceptRollback !== true) {
    throw new ToolstackError(
      'usage',
      `what was saved after the backup was made is lost for good; vtpmctl inspect ${file} shows when that was. ` +
        'To go on add --accept-rollback',
    );
  }
  if (existsSync(paths.manager.enrolment)) {
    throw new ToolstackError(
      'already-initialised',
      `there is an installation in ${paths.home}; single vTPMs go back with vtpmctl restore`,
    );
  }
  privateDirectory(paths.home);
  const key = makeToolstackKey(paths);
  const { recoveryKeyFile } = flags;
  const made = await runManagerCommand<Rebuilt>(paths, [
    ...['rebuild', resolve(file), '--key-file', resolve(flags.key)],
    ...['--toolstack-key', key.publicKey.toString('hex')],
    ...(recoveryKeyFile === undefined ? [] : ['--recovery-key-file', resolve(recoveryKeyFile)]),
  ]);
  const { managerId, storeId, tpm, pcrSelection } = made;
  writeFileDurably(
    paths.toolstack.managerIdentity,
    `${JSON.stringify({ managerId, storeId, tpm, pcrSelection }, null, 2)}\n`,
  );
  output.result(
    made,
    [
      ...made.vtpms.map(
        ({ id, kind, generation }) =>
          `${(kind === 'live' ? 'restored' : kind).padEnd(8)}  ${id}, generation ${sayGeneration(generation)}`,
      ),
      `rebuilt   ${paths.home}`,
      made.needsRecover
        ? 'next: vtpmctl recover --recovery-key-file FILE --accept-rollback, then vtpmctl up'
        : 'next: vtpmctl up, vtpmctl image allow, then vtpmctl create NAME --adopt ID for each',
    ].join('\n'),
  );
}

interface Inspection {
  readonly what: string;
  readonly path: string;
  readonly verdict: 'ok' | 'damaged';
  readonly problems: readonly string[];
  readonly facts: Readonly<Record<string, string>>;
  readonly vtpms: readonly {
    readonly id: string;
    readonly kind: string;
    readonly generation: number;
    readonly epoch: number;
    readonly bytes: number;
    readonly marks: readonly string[];
    readonly libtpmsVersion: string;
    readonly savedAt: number;
  }[];
}

/** @returns the exit status: 0 only where nothing is wrong with it */
export async function inspect(path: string, { configuration, output }: Context): Promise<number> {
  const found = await runManagerCommand<Inspection>(configuration.paths, ['inspect', resolve(path)]);
  const rows = found.vtpms.map((vtpm) => [
    vtpm.id,
    vtpm.kind,
    sayGeneration(vtpm.generation),
    String(vtpm.epoch),
    bytes(vtpm.bytes),
    vtpm.savedAt === 0 ? '-' : time(new Date(vtpm.savedAt).toISOString()),
    vtpm.libtpmsVersion,
    vtpm.marks.join(', '),
  ]);
  const head = ['ID', 'KIND', 'GENERATION', 'EPOCH', 'SIZE', 'SAVED', 'LIBTPMS', 'MARKS'];
  output.result(
    found,
    [
      fields([[found.what, found.path], ['verdict', found.verdict], ...Object.entries(found.facts)]),
      ...found.problems.map((problem) => `problem: ${problem}`),
      ...(rows.length === 0 ? [] : [table(head, rows)]),
    ].join('\n'),
  );
  return found.verdict === 'ok' ? EXIT.ok : EXIT.failed;
}

/** A vTPM may be named by its id where the supervisor does not know it. */
async function idsOf(names: readonly string[], { supervisor }: Context): Promise<string[]> {
  const ids: string[] = [];
  for (const name of names) ids.push(isUuid(name) ? name.toLowerCase() : (await supervisor.vtpm(name)).id);
  return ids;
}
