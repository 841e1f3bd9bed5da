import { closeSync, fstatSync } from 'node:fs';
import { closeUnknown, isUnixStream } from 'vtpm-common/passed-descriptors';
import { peekDescriptors } from '../channels/passed-message.js';
import type { Asker } from './control-connection.js';
import { ControlRefusal, RESULT } from './results.js';

/** The stream that the VMM's TPM commands come through. */
export interface DataConnection {
  readonly fd: number;
  /** From this moment `fd` may be another descriptor; that it is closed is heard later where a command of it runs. */
  readonly isGone: boolean;
  close(): void;
}

export interface DataChannelParts {
  /** Gives the supervisor a copy of the descriptor; `opened` or `refused` follows. */
  offer(fd: number): void;
  /** As CommandQueue.dropGone. */
  dropGone(): void;
}

/**
 * What SET_DATAFD gives. The descriptor goes to the supervisor, which keeps it, so that it outlives this worker, and passes it
 * back as a connection of the door `vmm-data`. One at a time, and with the control connection it ends.
 */
export class DataChannel {
  readonly #parts: DataChannelParts;
  #connection: DataConnection | undefined;
  #offered: { accepted(): void; refused(): void } | undefined;
  /** Waits for the end of what is gone. */
  #wasClosed: (() => void) | undefined;

  constructor(parts: DataChannelParts) {
    this.#parts = parts;
  }

  get isOpen(): boolean {
    return this.#connection !== undefined && !this.#connection.isGone;
  }

  /**
   * SET_DATAFD. The same socket once more is as good as new: a worker before this one may have been ended after the supervisor
   * took it and before the VMM heard so.
   * @throws ControlRefusal
   */
  async set(asker: Pick<Asker, 'fd' | 'length'>): Promise<void> {
    // The supervisor has that of the VMM before this one until its command is done.
    if (this.#connection?.isGone) await new Promise<void>((resolve) => (this.#wasClosed = resolve));
    const descriptors = peekDescriptors(asker.fd, asker.length);
    try {
      const [fd] = descriptors;
      if (fd === undefined || descriptors.length > 1 || !isUnixStream(fd)) {
        throw new ControlRefusal(RESULT.BadParameter, 'SET_DATAFD came without one unix stream socket');
      }
      if (this.#connection) {
        if (fstatSync(this.#connection.fd).ino === fstatSync(fd).ino) return;
        throw new ControlRefusal(RESULT.IoError, 'there is a data channel already');
      }
      const answered = new Promise<boolean>((resolve) => {
        this.#offered = { accepted: () => resolve(true), refused: () => resolve(false) };
      });
      this.#parts.offer(fd);
      if (!(await answered))
        throw new ControlRefusal(RESULT.IoError, 'the supervisor does not keep the data channel');
    } finally {
      for (const fd of descriptors) {
        if (isUnixStream(fd)) closeSync(fd);
        else closeUnknown(fd);
      }
    }
  }

  /** The supervisor passed one: the one that was offered, or that of a worker before this one. */
  opened(connection: DataConnection): void {
    this.#connection = connection;
    this.#offered?.accepted();
    this.#offered = undefined;
  }

  refused(): void {
    this.#offered?.refused();
    this.#offered = undefined;
  }

  closed(connection: DataConnection): void {
    if (this.#connection !== connection) return;
    this.#connection = undefined;
    this.#wasClosed?.();
    this.#wasClosed = undefined;
  }

  /** The VMM is gone. */
  close(): void {
    this.#connection?.close();
    this.#parts.dropGone();
  }
}
