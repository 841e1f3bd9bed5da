import { readFileSync } from 'node:fs';
import { until } from './until.js';

/** System calls that change what is on a disk, or make it durable. */
const CALLS =
  'openat,write,writev,pwrite64,pwritev,lseek,ftruncate,fsync,fdatasync,rename,unlink,mkdir,' +
  // Not used, and a disk that they had changed would be rebuilt wrongly.
  'creat,pwritev2,truncate,fallocate,msync,sync_file_range,copy_file_range,sendfile,renameat,renameat2,unlinkat,link,linkat';

/** The command line that records what a program writes, without becoming its parent. */
export function tracedTo(path: string): string[] {
  return [
    'strace',
    '-D',
    '-f',
    '--seccomp-bpf',
    '-ttt',
    '-y',
    '-xx',
    '-s',
    '99999999',
    '-e',
    CALLS,
    '-o',
    path,
  ];
}

/** One of the two moments of a call. Between them it is under way. */
export interface Moment {
  /** Unix milliseconds. */
  readonly at: number;
  readonly isBegin: boolean;
  readonly call: DiskCall;
}

export type DiskCall =
  | { readonly kind: 'open'; readonly path: string; readonly isNew: boolean; readonly isEmptied: boolean }
  | {
      readonly kind: 'write';
      readonly path: string;
      readonly offset: Offset;
      readonly data: Buffer;
      readonly isSynced: boolean;
    }
  | { readonly kind: 'truncate'; readonly path: string; readonly size: number }
  | { readonly kind: 'sync'; readonly path: string }
  | { readonly kind: 'rename'; readonly path: string; readonly to: string }
  | { readonly kind: 'unlink'; readonly path: string };

/** `end` of the file as it is then: for files that are appended to. */
export type Offset = number | 'end';

/** Waits until everything that was traced has ended. @returns what was done below `directory`, in order */
export async function readTrace(path: string, directory: string): Promise<Moment[]> {
  const text = await until('the trace is complete', () => {
    const all = readFileSync(path, 'latin1');
    const began = new Set([...all.matchAll(/^(\d+) /gm)].map(([, pid]) => pid));
    const ended = [...all.matchAll(/^(\d+) +[\d.]+ \+\+\+ /gm)];
    return began.size > 0 && ended.length >= began.size && all;
  });
  const reader = new TraceReader(directory);
  for (const line of text.split('\n')) reader.take(line);
  return reader.moments;
}

interface OpenFile {
  position: Offset;
  readonly isSynced: boolean;
}

class TraceReader {
  readonly moments: Moment[] = [];
  readonly #begun = new Map<string, { readonly text: string; readonly moment: number }>();
  /** By descriptor and path: two processes never have the same of both. */
  readonly #files = new Map<string, OpenFile>();

  constructor(private readonly directory: string) {}

  take(line: string): void {
    const [, pid = '', time = '', rest = ''] = /^(\d+) +([\d.]+) (.*)$/.exec(line) ?? [];
    const at = Number(time) * 1000;
    if (rest.endsWith(' <unfinished ...>')) {
      const text = rest.slice(0, -' <unfinished ...>'.length);
      this.#begun.set(pid, { text, moment: this.moments.length });
      // What a call that began first is about is known only at its end; until then its place is kept.
      this.moments.push({ at, isBegin: true, call: { kind: 'sync', path: '' } });
      return;
    }
    const resumed = /^<\.\.\. \w+ resumed>/.exec(rest);
    const begun = resumed ? this.#begun.get(pid) : undefined;
    this.#begun.delete(pid);
    const call = this.#parse((begun?.text ?? '') + rest.slice(resumed?.[0].length ?? 0));
    if (!call) return;
    if (begun) this.moments[begun.moment] = { at: this.moments[begun.moment]?.at ?? at, isBegin: true, call };
    else this.moments.push({ at, isBegin: true, call });
    this.moments.push({ at, isBegin: false, call });
  }

  #parse(text: string): DiskCall | undefined {
    const [, name = '', args = '', result = ''] = /^(\w+)\((.*)\) += (-?\d+.*)$/.exec(text) ?? [];
    if (name === '' || result.startsWith('-')) return undefined;
    if (name === 'openat') return this.#open(args, result);
    const [fd = '', path = ''] = descriptor(args);
    const named = strings(args).map((bytes) => bytes.toString('latin1'));
    const subject = fd === '' ? (named[0] ?? '') : path;
    if (subject !== this.directory && !subject.startsWith(`${this.directory}/`)) return undefined;
    const file = this.#files.get(`${fd} ${path}`) ?? { position: 0, isSynced: false };
    switch (name) {
      case 'write':
      case 'writev': {
        const data = Buffer.concat(strings(args)).subarray(0, Number(result));
        const { position, isSynced } = file;
        if (position !== 'end') file.position = position + data.length;
        return { kind: 'write', path, offset: position, data, isSynced };
      }
      case 'pwrite64':
      case 'pwritev': {
        const data = Buffer.concat(strings(args)).subarray(0, Number(result));
        const offset = Number(/, (\d+)$/.exec(args)?.[1]);
        return { kind: 'write', path, offset, data, isSynced: file.isSynced };
      }
      case 'lseek':
        if (file.position !== 'end') file.position = Number(result);
        return undefined;
      case 'ftruncate':
        return { kind: 'truncate', path, size: Number(/, (\d+)$/.exec(args)?.[1]) };
      case 'fsync':
      case 'fdatasync':
        return { kind: 'sync', path };
      case 'rename':
        return { kind: 'rename', path: subject, to: named[1] ?? '' };
      case 'unlink':
        return { kind: 'unlink', path: subject };
      case 'mkdir':
        return undefined;
      default:
        throw new Error(`${name} of ${subject} cannot be replayed`);
    }
  }

  #open(args: string, result: string): DiskCall | undefined {
    const [fd = '', path = ''] = descriptor(result);
    if (!path.startsWith(`${this.directory}/`)) return undefined;
    this.#files.set(`${fd} ${path}`, {
      position: args.includes('O_APPEND') ? 'end' : 0,
      isSynced: /O_D?SYNC/.test(args),
    });
    const isNew = args.includes('O_CREAT');
    const isEmptied = args.includes('O_TRUNC');
    return isNew || isEmptied ? { kind: 'open', path, isNew, isEmptied } : undefined;
  }
}

function descriptor(text: string): string[] {
  const [, fd = '', path = ''] = /^(\d+)<([^>]*)>/.exec(text) ?? [];
  return [fd, plain(path)];
}

function strings(args: string): Buffer[] {
  return [...args.matchAll(/"((?:\\x[0-9a-f]{2})*)"/g)].map(([, hex = '']) =>
    Buffer.from(hex.replaceAll('\\x', ''), 'hex'),
  );
}

function plain(path: string): string {
  return path.replace(/\\x([0-9a-f]{2})/g, (_, hex: string) => String.fromCharCode(Number.parseInt(hex, 16)));
}
