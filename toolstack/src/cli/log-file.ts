import { closeSync, existsSync, fstatSync, openSync, readSync } from 'node:fs';
import { join } from 'node:path';
import type { Paths } from 'vtpm-common';
import type { Daemon } from './http.js';

const TAIL_BYTES = 1024 * 1024;

export function logFile(paths: Paths, daemon: Daemon): string {
  return join(paths.log, `${daemon}.log`);
}

/** What the worker of a vTPM says is in a file of its own. */
export function workerLogFile(paths: Paths, name: string): string {
  return join(paths.log, `vtpm-${name}.log`);
}

/** A whole line of a daemon's log; lines that are no JSON object stand as they are. */
export interface LogLine {
  readonly text: string;
  /** Milliseconds since 1970, 0 where the line has none. */
  readonly at: number;
  readonly entry?: Readonly<Record<string, unknown>>;
}

export function parseLogLine(text: string): LogLine {
  if (text.startsWith('{')) {
    try {
      const entry = JSON.parse(text) as Record<string, unknown>;
      const at = typeof entry.time === 'number' ? entry.time : Date.parse(String(entry.time));
      return { text, at: Number.isNaN(at) ? 0 : at, entry };
    } catch {
      // A line cut by a crash.
    }
  }
  return { text, at: 0 };
}

/** The last `count` whole lines after byte `from`, at most those of the last MiB. */
export function tail(path: string, from: number, count: number): LogLine[] {
  return readLines(path, from, TAIL_BYTES).lines.slice(-count);
}

/** Whole lines after byte `from` and where the next one begins. A file that shrank is read from its start. */
export function readLines(
  path: string,
  from: number,
  most = Number.POSITIVE_INFINITY,
): { lines: LogLine[]; next: number } {
  if (!existsSync(path)) return { lines: [], next: 0 };
  const fd = openSync(path, 'r');
  try {
    const { size } = fstatSync(fd);
    const start = Math.max(size < from ? 0 : from, size - most);
    const bytes = Buffer.alloc(size - start);
    let filled = 0;
    while (filled < bytes.length) {
      const count = readSync(fd, bytes, filled, bytes.length - filled, start + filled);
      if (count === 0) break;
      filled += count;
    }
    const whole = bytes.subarray(0, filled).lastIndexOf(0x0a) + 1;
    const lines = bytes.subarray(0, whole).toString('utf8').split('\n').slice(0, -1);
    // The first line of a cut-off beginning is a part.
    if (start > from) lines.shift();
    return { lines: lines.filter((line) => line !== '').map(parseLogLine), next: start + whole };
  } finally {
    closeSync(fd);
  }
}

const LEVELS: Readonly<Record<string, string>> = {
  10: 'trace',
  20: 'debug',
  30: 'info',
  40: 'warn',
  50: 'error',
  60: 'fatal',
};
const SHOWN_APART = new Set(['time', 'level', 'msg', 'name', 'pid', 'hostname']);

/** What a line says, without time and origin. */
export function sayLogLine({ text, entry }: LogLine): string {
  if (!entry) return text;
  const rest = Object.entries(entry)
    .filter(([key]) => !SHOWN_APART.has(key))
    .map(([key, value]) => ` ${key}=${typeof value === 'string' ? value : JSON.stringify(value)}`);
  return `${String(entry.msg ?? '')}${rest.join('')}`;
}

/** One line for people: time, level, program, message and the rest as key=value. */
export function formatLogLine(line: LogLine): string {
  const { entry, at } = line;
  if (!entry) return line.text;
  const when = at === 0 ? '' : new Date(at).toISOString().replace('T', ' ').replace('Z', '');
  const level = LEVELS[String(entry.level)] ?? String(entry.level ?? '');
  return `${when} ${level.padEnd(5)} ${String(entry.name ?? '')}: ${sayLogLine(line)}`;
}

/** Whether a line speaks of the vTPM: its id stands anywhere in it, or its name is the value of a field. */
export function isAbout(line: LogLine, vtpm: { readonly id: string; readonly name: string }): boolean {
  if (line.text.includes(vtpm.id)) return true;
  if (!line.entry) return false;
  return Object.entries(line.entry).some(([key, value]) => key !== 'name' && value === vtpm.name);
}
