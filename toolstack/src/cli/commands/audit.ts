import { once } from 'node:events';
import { type FileHandle, open, rename, rm } from 'node:fs/promises';
import type { Command } from 'commander';
import { ToolstackError } from '../../error.js';
import type { Add, Run } from '../command-line.js';
import type { Context } from '../context.js';
import { EXIT } from '../exit-status.js';
import type { AuditEntry, AuditVerdict } from '../manager-api.js';
import { runManagerCommand } from '../manager-command.js';
import { fields, table, time } from '../output.js';

const MAX_TAIL = 1000;

interface ExportFlags {
  readonly from?: string;
  readonly to?: string;
  readonly output?: string;
}

export function auditCommands(parent: Command, add: Add, run: Run): void {
  const tailCommand = add(parent, 'tail', 'shows the newest entries', [
    'vtpmctl audit tail',
    'vtpmctl audit tail -n 200 --json',
  ]).option('-n, --lines <count>', `how many, at most ${MAX_TAIL}`, '20');
  tailCommand.action((flags: { lines: string }) => run(tailCommand, (context) => tail(flags.lines, context)));

  const verifyCommand = add(
    parent,
    'verify',
    'looks whether an entry was changed, taken out or put in; with the manager stopped, too',
    ['vtpmctl audit verify', 'vtpmctl audit verify --json'],
  );
  verifyCommand.action(() => run(verifyCommand, verify));

  const exportCommand = add(parent, 'export', "writes entries as they are in the log, for others' tools", [
    'vtpmctl audit export -o audit.jsonl',
    'vtpmctl audit export --from 1000 --to 1999 > audit.jsonl',
  ])
    .option('--from <number>', 'first entry (default: 1)')
    .option('--to <number>', 'last entry (default: the newest)')
    .option(
      '-o, --output <file>',
      'file to write, which is there when all of it is (default: standard output)',
    );
  exportCommand.action((flags: ExportFlags) => run(exportCommand, (context) => exportLog(flags, context)));
}

async function tail(lines: string, { manager, output }: Context): Promise<void> {
  const count = /^\d{1,4}$/.test(lines) ? Number(lines) : 0;
  if (count < 1 || count > MAX_TAIL) {
    throw new ToolstackError(
      'usage',
      `--lines is a number from 1 to ${MAX_TAIL}, not "${lines.slice(0, 40)}"`,
    );
  }
  const entries = await manager.auditTail(count);
  const rows = entries.map((entry) => [
    String(entry.n),
    time(entry.time),
    actor(entry.actor),
    entry.action,
    entry.verdict,
    entry.vtpm ?? '-',
    rest(entry),
  ]);
  output.result({ entries }, table(['ENTRY', 'TIME', 'WHO', 'WHAT', 'VERDICT', 'VTPM', ''], rows));
}

function actor(who: AuditEntry['actor']): string {
  if (who === 'manager') return who;
  if ('uid' in who) return `uid ${who.uid}`;
  return 'worker' in who ? `worker ${who.worker}` : `toolstack key ${who.toolstackKey.slice(0, 16)}`;
}

function rest({ epoch, generation, reason, facts = {} }: AuditEntry): string {
  return [
    ...(epoch === undefined ? [] : [`epoch=${epoch}`]),
    ...(generation === undefined ? [] : [`generation=${generation}`]),
    ...Object.entries(facts).map(([name, value]) => `${name}=${value}`),
    ...(reason ? [`${reason.message} (${reason.code})`] : []),
  ].join(' ');
}

/** @returns the exit status: a log that is not whole is a failure */
async function verify({ manager, configuration, output }: Context): Promise<number> {
  const verdict = await manager.auditVerify().catch((error: unknown) => {
    if (ToolstackError.from(error).code !== 'not-running') throw error;
    return runManagerCommand<AuditVerdict>(configuration.paths, ['audit-verify']);
  });
  const { isWhole, checked, because, first, last, authenticated, unanchored, torn, flaw } = verdict;
  output.result(
    verdict,
    fields([
      ['verdict', flaw ? `DAMAGED: entry ${flaw.entry} of ${flaw.path} ${flaw.what}` : 'whole'],
      ['entries', `${first} to ${last}, ${authenticated} of them by MAC too`],
      ['older files', first > 1 ? `entries before ${first} were moved away` : null],
      [
        'newer',
        unanchored > 0 ? `${unanchored} entries than the anchor; their changes may not have happened` : null,
      ],
      ['torn', torn ? `${torn.path} ends with a part of an entry that was never acknowledged` : null],
    ]),
  );
  if (checked === 'chain') {
    output.note(
      `vtpmctl: only the chain was verified, without keys: whether entries are missing at its end, or all of it was written anew, is not known (${because})`,
    );
  }
  return isWhole ? EXIT.ok : EXIT.failed;
}

async function exportLog(
  { from, to, output: path }: ExportFlags,
  { manager, output }: Context,
): Promise<void> {
  const query = { ...entry('--from', 'from', from), ...entry('--to', 'to', to) };
  if (path === undefined) return await manager.auditExport(query, print);
  // A part of an export must not pass for one.
  const part = `${path}.part`;
  try {
    const file = await open(part, 'w', 0o600);
    try {
      await manager.auditExport(query, (chunk) => append(file, chunk));
      await file.sync();
    } finally {
      await file.close();
    }
    await rename(part, path);
  } catch (error) {
    await rm(part, { force: true });
    throw error;
  }
  output.result({ file: path }, `written  ${path}`);
}

async function append(file: FileHandle, chunk: Buffer): Promise<void> {
  try {
    await file.writeFile(chunk);
  } catch (error) {
    throw ToolstackError.from(error, 'the export cannot be written');
  }
}

async function print(chunk: Buffer): Promise<void> {
  if (!process.stdout.write(chunk)) await once(process.stdout, 'drain');
}

function entry(flag: string, name: string, text: string | undefined): Record<string, string> {
  if (text === undefined) return {};
  if (/^[1-9]\d{0,14}$/.test(text)) return { [name]: text };
  throw new ToolstackError('usage', `${flag} is the number of an entry, not "${text.slice(0, 40)}"`);
}
