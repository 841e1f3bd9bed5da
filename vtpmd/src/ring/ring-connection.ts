import { closeSync } from 'node:fs';
import { isClosing } from 'vtpm-common/passed-descriptors';
import { MOST_MESSAGE_BYTES, type PassedMessage, peekMessage } from '../channels/passed-message.js';
import { receiveNow, sendNow } from '../channels/socket-io.js';
import { WatchedSocket } from '../channels/watched-socket.js';
import { OpenRing, type RingParts } from './open-ring.js';
import { encodeNodes, invitation, RingRefusal, takeSetup, XENBUS } from './setup.js';

const CLOSING_RETRY_MS = 10;

const scratch = Buffer.alloc(MOST_MESSAGE_BYTES);

/**
 * A connection at the ring door: a device whose frontend opens and closes its ring as often as it likes, so that a boot loader
 * can measure and close, and the kernel open it again. The states are xenbus's:
 *
 * 1. This end says InitWait, its features and how many pages a ring may have.
 * 2. The frontend sends, in one message, Initialised, its features, the memory of the ring and one end of an event channel.
 * 3. This end says Connected, or Closed and why, and then closes the connection.
 * 4. The frontend closes its end of the event channel: back to 1. It closes the connection: all is over.
 *
 * The message with the descriptors stays in the connection as long as the ring is open, and the supervisor keeps the
 * connection: so the ring outlives the worker, and nobody else has to know of it. A worker that takes the connection over
 * says Connected once more.
 */
export class RingConnection {
  readonly #fd: number;
  readonly #socket: WatchedSocket;
  readonly #parts: RingParts;
  readonly #onClosed: () => void;
  #ring: OpenRing | undefined;
  #setupBytes = 0;
  #isClosed = false;

  /** @param fd owned by the connection from now on @param onClosed called once: none of its commands runs any more */
  constructor(fd: number, parts: RingParts, onClosed: () => void) {
    this.#fd = fd;
    this.#parts = parts;
    this.#onClosed = onClosed;
    this.#socket = new WatchedSocket(fd, () => this.#look(false));
  }

  /** @param isAdopted a worker before this one served it */
  start(isAdopted: boolean): void {
    // Who was told already may hear it again.
    this.#say(invitation());
    this.#look(isAdopted);
  }

  #look(isAdopted: boolean): void {
    if (isClosing()) {
      this.#socket.unwatch();
      setTimeout(() => this.#isClosed || this.#look(isAdopted), CLOSING_RETRY_MS);
      return;
    }
    const message = peekMessage(this.#fd);
    if (message === 'end') this.#close();
    else if (message) this.#open(message, isAdopted);
    else this.#socket.watch();
  }

  #open(message: PassedMessage, isAdopted: boolean): void {
    this.#socket.unwatch();
    try {
      const setup = takeSetup(message);
      try {
        this.#ring = new OpenRing(setup, this.#parts, {
          closed: () => this.#ringClosed(),
          failed: (why) => this.#refuse(why),
        });
      } catch (error) {
        closeSync(setup.event);
        throw error;
      } finally {
        closeSync(setup.page);
      }
    } catch (error) {
      const why = error instanceof RingRefusal ? error.message : 'it cannot be mapped';
      this.#refuse(`the ring is refused: ${why}`);
      return;
    }
    this.#setupBytes = message.bytes.length;
    this.#say(encodeNodes({ state: XENBUS.Connected }));
    this.#ring.start(isAdopted);
  }

  #ringClosed(): void {
    this.#ring = undefined;
    if (this.#isClosed) {
      this.#onClosed();
      return;
    }
    receiveNow(this.#fd, scratch.subarray(0, this.#setupBytes));
    this.#say(invitation());
    this.#look(false);
  }

  #refuse(why: string): void {
    this.#say(encodeNodes({ state: XENBUS.Closed, error: why }));
    // With something left behind, the frontend would hear of a reset connection instead.
    receiveNow(this.#fd, scratch);
    this.#close();
  }

  #close(): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    this.#socket.destroy();
    if (this.#ring) this.#ring.close();
    else this.#onClosed();
  }

  /** A frontend that does not read what it is told does without. */
  #say(message: Buffer): void {
    sendNow(this.#fd, message);
  }
}
