import { existsSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { ToolstackError } from '../../error.js';
import type { Context } from '../context.js';
import { isUuid } from '../inventory.js';
import { formatLogLine, isAbout, type LogLine, logFile, readLines, workerLogFile } from '../log-file.js';
import { printable } from '../output.js';

export interface LogsFlags {
  readonly follow?: boolean;
  readonly lines: string;
}

/** A new line is shown within this time with --follow. */
const FOLLOW_MS = 200;
const READ_AT_MOST_BYTES = 4 * 1024 * 1024;

/** What both daemons logged, in order of time; with a name what they and its worker say of that vTPM. */
export async function logs(nameOrId: string | undefined, flags: LogsFlags, context: Context): Promise<void> {
  const { paths } = context.configuration;
  if (!/^\d{1,6}$/.test(flags.lines)) {
    throw new ToolstackError('usage', `--lines is a number of lines, not "${flags.lines}"`);
  }
  const vtpm = nameOrId === undefined ? undefined : await identityOf(nameOrId, context);
  const sources: { path: string; accepts(line: LogLine): boolean; next: number }[] = (
    ['manager', 'supervisor'] as const
  ).map((daemon) => ({
    path: logFile(paths, daemon),
    accepts: (line) => vtpm === undefined || isAbout(line, vtpm),
    next: 0,
  }));
  if (vtpm) sources.push({ path: workerLogFile(paths, vtpm.name), accepts: () => true, next: 0 });

  const news = (most: number): LogLine[] => {
    const lines: LogLine[] = [];
    for (const source of sources) {
      const read = readLines(source.path, source.next, most);
      source.next = read.next;
      lines.push(...withTimes(read.lines).filter(source.accepts));
    }
    return lines.sort((a, b) => a.at - b.at);
  };
  const print = (lines: readonly LogLine[]): void => {
    for (const line of lines) {
      process.stdout.write(`${context.output.isJson ? asJson(line) : printable(formatLogLine(line))}\n`);
    }
  };
  const count = Number(flags.lines);
  if (!flags.follow && !sources.some(({ path }) => existsSync(path))) {
    context.output.note(
      `no logs in ${paths.log} yet; vtpmctl up starts daemons that log there, and a service manager's journal has those it starts`,
    );
  }
  print(count === 0 ? news(READ_AT_MOST_BYTES).slice(0, 0) : news(READ_AT_MOST_BYTES).slice(-count));
  while (flags.follow) {
    await sleep(FOLLOW_MS);
    print(news(READ_AT_MOST_BYTES));
  }
}

/** Lines that are no JSON, a stack for example, belong to the line before them. */
function withTimes(lines: readonly LogLine[]): LogLine[] {
  let at = 0;
  return lines.map((line) => {
    at = line.at || at;
    return line.at === 0 ? { ...line, at } : line;
  });
}

function asJson(line: LogLine): string {
  return line.entry ? line.text : JSON.stringify({ msg: line.text });
}

/** The logs of a vTPM must be readable when the supervisor is down: that is when they are needed. */
async function identityOf(nameOrId: string, { supervisor }: Context): Promise<{ id: string; name: string }> {
  try {
    return await supervisor.vtpm(nameOrId);
  } catch (error) {
    if (ToolstackError.from(error).code !== 'not-running') throw error;
    return isUuid(nameOrId) ? { id: nameOrId, name: nameOrId } : { id: `name:${nameOrId}`, name: nameOrId };
  }
}
