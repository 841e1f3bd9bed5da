import { closeSync } from 'node:fs';
import { flushContext } from '../engine/command.js';
import type { TpmEngine } from '../engine/engine.js';
import type { CommandQueue, CommandSource } from '../worker/command-queue.js';
import { HandleOwners } from './handle-owners.js';
import { serveTctiControl } from './tcti-control.js';
import { TpmConnection } from './tpm-connection.js';

/** The ways in. `tpm`: raw TPM stream. `tcti` and `tcti-ctrl`: what tpm2-tss's swtpm TCTI expects. */
export type DoorKind = 'tpm' | 'tcti' | 'tcti-ctrl';

export function isDoorKind(text: string): text is DoorKind {
  return text === 'tpm' || text === 'tcti' || text === 'tcti-ctrl';
}

/** All open connections of guests, whatever door they came through, in front of one queue. */
export class Doors {
  readonly #engine: TpmEngine;
  readonly #queue: CommandQueue;
  readonly #owners: HandleOwners;
  readonly #tcti = new Set<CommandSource>();

  constructor(engine: TpmEngine, queue: CommandQueue, owners: HandleOwners) {
    this.#engine = engine;
    this.#queue = queue;
    this.#owners = owners;
  }

  /** Serves the connected socket `fd`, which is closed with the connection. */
  open(kind: DoorKind, fd: number, onClosed: () => void): void {
    try {
      switch (kind) {
        case 'tpm':
          new TpmConnection(fd, this.#queue, onClosed);
          return;
        case 'tcti': {
          const connection = new TpmConnection(fd, this.#queue, (closed) => {
            this.#tcti.delete(closed);
            this.#flush(closed);
            onClosed();
          });
          this.#tcti.add(connection);
          return;
        }
        case 'tcti-ctrl': {
          const cancel = (): void => this.#cancelTcti();
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

  #flush(closed: CommandSource): void {
    for (const handle of this.#owners.release(closed)) {
      this.#queue.submitFirst({
        command: flushContext(handle),
        isGone: false,
        // A session may be gone already: the TPM ends one whose last command said so.
        answer: () => {},
        dropped: () => {},
      });
    }
  }

  /** A control connection does not say which data connection it belongs to, so at least the door must be the same. */
  #cancelTcti(): void {
    const current = this.#queue.current;
    if (current && this.#tcti.has(current)) this.#engine.cancel();
  }
}

export { HandleOwners };
