import { once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
import { createServer, type Server, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { socketFd } from 'vtpm-common/libc';
import type { KeptRun, KeptVisit, WorkerProcess } from './worker-process.js';

/** A `ring.sock` that passes what comes to a worker and keeps it, as the supervisor does. */
export class RingDoorway {
  readonly path: string;
  readonly #directory = mkdtempSync(join(tmpdir(), 'vtpm-ring-'));
  readonly #server: Server;
  readonly #kept: { readonly id: number; readonly socket: Socket }[] = [];
  #worker: WorkerProcess | undefined;

  private constructor(run: KeptRun) {
    this.path = join(this.#directory, 'ring.sock');
    this.#server = createServer({ pauseOnConnect: true, allowHalfOpen: true }, (socket) => {
      const kept = { id: run.nextId++, socket };
      socket.on('error', () => {});
      this.#kept.push(kept);
      this.#worker?.passKept([visitOf(kept)]);
    });
  }

  static async open(run: KeptRun): Promise<RingDoorway> {
    const doorway = new RingDoorway(run);
    doorway.#server.listen(doorway.path);
    await once(doorway.#server, 'listening');
    return doorway;
  }

  /** From now on connections go to `worker`, and those that it closes are closed here too. */
  leadTo(worker: WorkerProcess): void {
    this.#worker = worker;
    worker.onMessage = ({ type, id }) => {
      if (type === 'connection-closed') this.#forget(Number(id));
    };
  }

  /** For a worker that goes on. */
  get visits(): KeptVisit[] {
    return this.#kept.map(visitOf);
  }

  async close(): Promise<void> {
    for (const { socket } of this.#kept) socket.destroy();
    this.#server.close();
    await once(this.#server, 'close');
    rmSync(this.#directory, { recursive: true, force: true });
  }

  #forget(id: number): void {
    const index = this.#kept.findIndex((kept) => kept.id === id);
    if (index >= 0) this.#kept.splice(index, 1)[0]!.socket.destroy();
  }
}

function visitOf({ id, socket }: { readonly id: number; readonly socket: Socket }): KeptVisit {
  return { door: 'ring', id, fd: socketFd(socket) };
}
