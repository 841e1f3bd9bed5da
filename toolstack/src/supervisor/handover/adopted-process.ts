import { reapChild } from 'vtpm-common/exec';
import { type ProcessId, processId } from '../processes.js';

/** Not yet reaped, by process id: as long as it stands here, no other process can have the id. */
const unreaped = new Map<number, AdoptedProcess>();

/**
 * A child of this process that another program made before this process became what it is: libuv neither watches nor
 * reaps it.
 */
export class AdoptedProcess {
  readonly pid: number;
  /** Resolves with how it ended: `exit status 0`, `killed by SIGKILL`. It is reaped then. */
  readonly exited: Promise<string>;
  #resolve: (status: string) => void = () => undefined;

  /** One that has died meanwhile, or is none of this process's children, has exited at once. */
  constructor(id: ProcessId) {
    this.pid = id.pid;
    this.exited = new Promise((resolve) => {
      this.#resolve = resolve;
    });
    if (processId(id.pid)?.startTime !== id.startTime) {
      this.#resolve('it is gone');
      return;
    }
    if (unreaped.size === 0) process.on('SIGCHLD', reapAll);
    unreaped.set(this.pid, this);
    reapAll();
  }

  get hasExited(): boolean {
    return unreaped.get(this.pid) !== this;
  }

  kill(): void {
    if (!this.hasExited) process.kill(this.pid, 'SIGKILL');
  }

  reap(): void {
    const status = reapChild(this.pid);
    if (status && status.code === null && status.signal === null) return;
    unreaped.delete(this.pid);
    if (!status) this.#resolve('it is no child of this process');
    else this.#resolve(status.signal ? `killed by ${status.signal}` : `exit status ${status.code}`);
  }
}

/** One signal may stand for several children. Those that libuv made are not touched. */
function reapAll(): void {
  for (const child of [...unreaped.values()]) child.reap();
  if (unreaped.size === 0) process.off('SIGCHLD', reapAll);
}
