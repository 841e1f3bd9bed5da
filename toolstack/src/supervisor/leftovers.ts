import {
  readdirSync,
  readFileSync,
  readlinkSync,
  realpathSync,
  renameSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import { bootId, type Logger } from 'vtpm-common';
import { killAndWait, type ProcessId, processId } from './processes.js';

/**
 * Which worker processes there are, so that a supervisor that comes after a killed one can end them. Workers die with
 * their supervisor anyway (PR_SET_PDEATHSIG, and their control channel ends); this is the belt to those braces.
 */
export class WorkerLedger {
  readonly #path: string;
  readonly #log: Logger;
  readonly #workers = new Map<number, ProcessId>();

  constructor(path: string, log: Logger) {
    this.#path = path;
    this.#log = log;
  }

  add(processes: readonly ProcessId[]): void {
    for (const process of processes) this.#workers.set(process.pid, process);
    this.#write();
  }

  remove(processes: readonly ProcessId[]): void {
    for (const process of processes) this.#workers.delete(process.pid);
    this.#write();
  }

  /** Not synced: it needs to outlive the supervisor, not the kernel. A full disk is no reason to end a worker. */
  #write(): void {
    const content = { boot: bootId().toString('hex'), workers: [...this.#workers.values()] };
    try {
      writeFileSync(`${this.#path}.new`, JSON.stringify(content), { mode: 0o600 });
      renameSync(`${this.#path}.new`, this.#path);
    } catch (error) {
      this.#log.warn(
        { path: this.#path, reason: (error as Error).message },
        "the workers' ledger cannot be written",
      );
    }
  }
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
    const content = JSON.parse(readFileSync(path, 'utf8')) as { boot?: unknown; workers?: unknown };
    if (content.boot !== bootId().toString('hex') || !Array.isArray(content.workers)) return [];
    return content.workers.filter(
      (item: Partial<ProcessId> | null): item is ProcessId =>
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
