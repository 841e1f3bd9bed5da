import {
  closeSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  realpathSync,
  renameSync,
  statSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { join } from 'node:path';
import { bootId, type Logger } from 'vtpm-common';
import { killAndWait, type ProcessId, processId } from './processes.js';

/** Lines behind the first one, beside one for each process: then the ledger is written anew. */
const SPARE_LINES = 4096;

/**
 * Which worker processes there are, so that a supervisor that comes after a killed one can end them. Workers die with
 * their supervisor anyway (PR_SET_PDEATHSIG, and their control channel ends); this is the belt to those braces. The first line
 * of the file has those that there were when it was written, each further one somebody who came, or who is gone.
 */
export class WorkerLedger {
  readonly #path: string;
  readonly #log: Logger;
  readonly #workers = new Map<number, ProcessId>();
  #fd: number | undefined;
  #lines = 0;

  constructor(path: string, log: Logger) {
    this.#path = path;
    this.#log = log;
  }

  add(processes: readonly ProcessId[]): void {
    for (const process of processes) this.#workers.set(process.pid, process);
    this.#note(processes.map(({ pid, startTime }) => ({ pid, startTime })));
  }

  remove(processes: readonly ProcessId[]): void {
    for (const process of processes) this.#workers.delete(process.pid);
    this.#note(processes.map(({ pid }) => ({ gone: pid })));
  }

  /** Not synced: it needs to outlive the supervisor, not the kernel. A full disk is no reason to end a worker. */
  #note(lines: readonly object[]): void {
    try {
      this.#lines += lines.length;
      if (this.#fd === undefined || this.#lines > SPARE_LINES + this.#workers.size) this.#writeAnew();
      else writeSync(this.#fd, lines.map((line) => `${JSON.stringify(line)}\n`).join(''));
    } catch (error) {
      // What was written of a line would spoil the next one.
      this.#close();
      this.#log.warn(
        { path: this.#path, reason: (error as Error).message },
        "the workers' ledger cannot be written",
      );
    }
  }

  #writeAnew(): void {
    this.#close();
    const content = { boot: bootId().toString('hex'), workers: [...this.#workers.values()] };
    writeFileSync(`${this.#path}.new`, `${JSON.stringify(content)}\n`, { mode: 0o600 });
    renameSync(`${this.#path}.new`, this.#path);
    this.#fd = openSync(this.#path, 'a');
    this.#lines = 0;
  }

  #close(): void {
    if (this.#fd !== undefined) closeSync(this.#fd);
    this.#fd = undefined;
  }
}

/** Those that a ledger names. A last line without an end was not written to its end. @throws Error */
function readLedger(path: string): unknown[] {
  const [first = '', ...lines] = readFileSync(path, 'utf8').split('\n');
  const { boot, workers } = JSON.parse(first) as { boot?: unknown; workers?: unknown };
  if (boot !== bootId().toString('hex') || !Array.isArray(workers)) return [];
  const found = new Map<unknown, unknown>(workers.map((worker: { pid?: unknown }) => [worker?.pid, worker]));
  for (const line of lines.slice(0, -1)) {
    const change = JSON.parse(line) as { pid?: unknown; gone?: unknown };
    if ('gone' in change) found.delete(change.gone);
    else found.set(change.pid, change);
  }
  return [...found.values()];
}

/**
 * Ends every process of an earlier supervisor's workers: those its ledger names, and those that execute one of
 * the worker images, whatever the ledger says. @param spared workers that are taken over @returns how many were found
 */
export async function endLeftovers(
  ledgerPath: string,
  imageDirectories: readonly string[],
  spared: readonly ProcessId[] = [],
): Promise<number> {
  const found = new Map<number, ProcessId>();
  for (const process of [...fromLedger(ledgerPath), ...imageDirectories.flatMap(fromImages)]) {
    if (processId(process.pid)?.startTime === process.startTime) found.set(process.pid, process);
  }
  for (const { pid } of spared) found.delete(pid);
  await killAndWait([...found.values()]);
  return found.size;
}

function fromLedger(path: string): ProcessId[] {
  try {
    return (readLedger(path) as (Partial<ProcessId> | null)[]).filter(
      (item): item is ProcessId =>
        typeof item?.pid === 'number' && item.pid > 1 && typeof item.startTime === 'string',
    );
  } catch {
    // Absent or torn: the images are searched for all the same.
    return [];
  }
}

/** Processes whose root directory is an image's tree (a sandbox) or whose program lies in one (isolation none). */
function fromImages(directory: string): ProcessId[] {
  const roots = new Set<string>();
  for (const name of listDirectory(directory)) {
    const root = identityOf(join(directory, name, 'root'));
    if (root) roots.add(root);
  }
  if (roots.size === 0) return [];
  // The kernel names programs without symbolic links; --home may lead through one.
  const programs = `${realpathSync(directory)}/`;
  const found: ProcessId[] = [];
  for (const name of listDirectory('/proc')) {
    const pid = Number(name);
    if (!Number.isInteger(pid) || pid === process.pid) continue;
    const root = identityOf(`/proc/${pid}/root/`);
    if ((root && roots.has(root)) || linkOf(`/proc/${pid}/exe`).startsWith(programs)) {
      const id = processId(pid);
      if (id) found.push(id);
    }
  }
  return found;
}

function identityOf(path: string): string | undefined {
  try {
    const { dev, ino } = statSync(path);
    return `${dev}:${ino}`;
  } catch {
    return undefined;
  }
}

function linkOf(path: string): string {
  try {
    return readlinkSync(path);
  } catch {
    return '';
  }
}

function listDirectory(path: string): string[] {
  try {
    return readdirSync(path);
  } catch {
    return [];
  }
}
