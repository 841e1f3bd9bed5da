import { closeSync } from 'node:fs';
import { peerCredentials } from 'vtpm-common/libc';
import { flushContext } from '../engine/command.js';
import type { TpmEngine } from '../engine/engine.js';
import type { CommandQueue } from '../worker/command-queue.js';
import type { HandleOwner, HandleOwners } from './handle-owners.js';
import { serveTctiControl } from './tcti-control.js';
import { TpmConnection } from './tpm-connection.js';

/** The ways in. `tpm`: raw TPM stream. `tcti` and `tcti-ctrl`: what tpm2-tss's swtpm TCTI expects. */
export type DoorKind = 'tpm' | 'tcti' | 'tcti-ctrl';

export function isDoorKind(text: string): text is DoorKind {
  return text === 'tpm' || text === 'tcti' || text === 'tcti-ctrl';
}

/**
 * All connections of guests, whatever door they came through, in front of one queue.
 *
 * Clients of the tcti door share the TPM's few slots, so what one leaves loaded is flushed when it is gone. tpm2-tss
 * opens a new connection for every command (and one more, without a command, when it starts), so a client is a process,
 * and it is gone when the process is. Who keeps a connection for several commands is gone with the connection.
 */
export class Doors {
  readonly #engine: TpmEngine;
  readonly #queue: CommandQueue;
  readonly #owners: HandleOwners;
  /** Clients that the supervisor watches; the others are processes that this one can see. */
  readonly #watched = new Set<number>();
  #connections = 0;

  constructor(engine: TpmEngine, queue: CommandQueue, owners: HandleOwners) {
    this.#engine = engine;
    this.#queue = queue;
    this.#owners = owners;
  }

  /**
   * Serves the connected socket `fd`, which is closed with the connection.
   * @param peer process id of the client as the supervisor sees it: from within a sandbox it cannot be seen
   */
  open(kind: DoorKind, fd: number, peer: number | undefined, onClosed: () => void): void {
    try {
      switch (kind) {
        case 'tpm':
          new TpmConnection(fd, this.#queue, onClosed);
          return;
        case 'tcti':
          this.#openTcti(fd, this.#clientOf(fd, peer), onClosed);
          return;
        case 'tcti-ctrl': {
          const client = this.#clientOf(fd, peer);
          const cancel = (): void => {
            if (this.#queue.current?.owner?.client === client) this.#engine.cancel();
          };
          serveTctiControl(fd, { established: this.#engine.established, cancel }, onClosed);
          return;
        }
      }
    } catch {
      // The peer is gone already and the descriptor is of no use.
      closeSync(fd);
      onClosed();
    }
  }

  /** The process ended: what it left loaded is flushed. */
  peerGone(client: number): void {
    this.#watched.delete(client);
    this.#flush((owner) => owner.client === client);
  }

  #openTcti(fd: number, client: number, onClosed: () => void): void {
    for (const other of this.#owners.clients()) {
      if (other !== 0 && !this.#watched.has(other) && !isAlive(other)) this.peerGone(other);
    }
    const owner: HandleOwner = { client, connection: ++this.#connections };
    new TpmConnection(
      fd,
      this.#queue,
      ({ commands }) => {
        if (commands > 1) this.#flush((other) => other === owner);
        // Nobody knows this client, but it is new: so the ones before it are taken to be gone.
        else if (commands === 0 && client === 0) this.peerGone(0);
        onClosed();
      },
      owner,
      'tcti',
    );
  }

  #clientOf(fd: number, peer: number | undefined): number {
    if (peer === undefined) {
      const { pid } = peerCredentials(fd);
      // A pair made here stands for a client beyond the port of a VM.
      return pid === process.pid ? 0 : pid;
    }
    this.#watched.add(peer);
    return peer;
  }

  #flush(matches: (owner: HandleOwner) => boolean): void {
    for (const handle of this.#owners.release(matches)) {
      this.#queue.submitFirst({
        command: flushContext(handle),
        isGone: false,
        // A session may be gone already: the TPM ends one whose last command said so.
        answer: () => {},
        dropped: () => {},
      });
    }
  }
}

function isAlive(pid: number): boolean {
  try {
    return process.kill(pid, 0);
  } catch (error) {
    return (error as NodeJS.ErrnoException).code !== 'ESRCH';
  }
}
