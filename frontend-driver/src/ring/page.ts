import { FrontendError } from '../error.js';
import { MAX_MESSAGE_BYTES, HEADER_BYTES as MESSAGE_HEADER_BYTES } from '../framing.js';

/** Xen's tpmif, version 2 (xen/include/public/io/tpmif.h); docs/ring.md has the layout. */
export const PAGE_BYTES = 4096;
const HEADER_BYTES = 8;
export const STATE = { IDLE: 0, SUBMIT: 1, FINISH: 2, CANCEL: 3 } as const;

/** In the length of a request: the backend has taken it. */
const CLAIMED = 0x80000000;

const LENGTH_WORD = 0;
const STATE_WORD = 1;

/** The frontend's side of a ring's memory. */
export class FrontendPage {
  readonly #bytes: Buffer;
  readonly #words: Uint32Array;
  readonly #packet: number;
  /** Pages after the first, all of which every packet may use. */
  readonly #extra: number;
  /** Of the newest request: state, locality, number of pages. */
  #stateWord = 0;

  /** @param bytes whole pages, zeroed, aligned to 8 bytes */
  constructor(bytes: Buffer) {
    this.#bytes = bytes;
    this.#words = new Uint32Array(bytes.buffer, bytes.byteOffset, 2);
    this.#extra = bytes.length / PAGE_BYTES - 1;
    this.#packet = HEADER_BYTES + 4 * this.#extra;
    for (let index = 1; index <= this.#extra; index++) {
      bytes.writeUInt32LE(index, HEADER_BYTES + 4 * (index - 1));
    }
  }

  /** How long a command or an answer can be. */
  get room(): number {
    return Math.min(this.#bytes.length - this.#packet, MAX_MESSAGE_BYTES);
  }

  get state(): number {
    return Atomics.load(this.#words, STATE_WORD) & 0xff;
  }

  /** @param command of at most `room` bytes @param locality 0 to 255 */
  submit(command: Uint8Array, locality: number): void {
    this.#bytes.set(command, this.#packet);
    Atomics.store(this.#words, LENGTH_WORD, command.length);
    this.#stateWord = (STATE.SUBMIT | (locality << 8) | (this.#extra << 24)) >>> 0;
    Atomics.store(this.#words, STATE_WORD, this.#stateWord);
  }

  /** Whether the backend has taken the newest request: it marks the length, or there is an answer. */
  get isTaken(): boolean {
    return this.state === STATE.FINISH || Atomics.load(this.#words, LENGTH_WORD) >= CLAIMED;
  }

  /** Asks for the request to be given up. @returns false where there is an answer meanwhile */
  cancel(): boolean {
    const wanted = ((this.#stateWord & 0xffffff00) | STATE.CANCEL) >>> 0;
    return Atomics.compareExchange(this.#words, STATE_WORD, this.#stateWord, wanted) === this.#stateWord;
  }

  /** A copy of the answer. Call it when the state is FINISH. @throws FrontendError `protocol` where it is none */
  answer(): Buffer {
    const length = Atomics.load(this.#words, LENGTH_WORD);
    if (length < MESSAGE_HEADER_BYTES || length > this.room) {
      throw new FrontendError('protocol', `the vTPM put an answer of ${length} bytes into the ring`);
    }
    const answer = Buffer.from(this.#bytes.subarray(this.#packet, this.#packet + length));
    if (answer.readUInt32BE(2) !== length) {
      throw new FrontendError('protocol', 'the size of an answer is not the one that it says');
    }
    return answer;
  }
}
