import { HEADER_BYTES as COMMAND_HEADER_BYTES, MAX_COMMAND_BYTES } from '../engine/command.js';

/**
 * The shared page of Xen's tpmif, version 2 (xen/include/public/io/tpmif.h), in the host's byte order, which is little-endian
 * on every architecture that workers run on:
 *
 * | offset | bytes | |
 * | --- | --- | --- |
 * | 0 | 4 | length of the request, then of the response |
 * | 4 | 1 | state |
 * | 5 | 1 | locality |
 * | 6 | 1 | nothing |
 * | 7 | 1 | n, the number of extra pages that the packet may go on in |
 * | 8 | 4 n | which pages: of the memory, 1 to n in this order |
 * | 8 + 4 n | | the packet |
 */
export const PAGE_BYTES = 4096;
/** The largest command and answer fit into two. Below 64 KiB, so that no memory of huge pages has that size. */
export const MOST_PAGES = 4;

/** The frontend writes SUBMIT and CANCEL, the backend FINISH and IDLE. */
export const STATE = { IDLE: 0, SUBMIT: 1, FINISH: 2, CANCEL: 3 } as const;

const HEADER_BYTES = 8;
const LENGTH_WORD = 0;
const STATE_WORD = 1;
/** In the length of a request: the backend has taken it. No packet is so long. */
const CLAIMED = 0x80000000;
const SEQUENCE_MASK = 0x7fffffff;

/** A request as it was when it was looked at. */
export interface RingRequest {
  readonly locality: number;
  /** Bytes of the copy; undefined where the page cannot hold such a request. */
  readonly length: number | undefined;
}

/**
 * The backend's side of a ring's memory, in which the frontend can change any byte at any time. Everything is read once;
 * what is checked is what was read. Offsets come from the n that was read with the request and from the size of the memory,
 * so nothing outside of it is ever touched.
 */
export class RingPage {
  readonly #bytes: Buffer;
  readonly #words: Uint32Array;
  readonly #header: BigUint64Array;
  /** Of the newest request. */
  #stateWord = 0;
  #packet = HEADER_BYTES;

  /** @param bytes whole pages, aligned to 8 bytes */
  constructor(bytes: Buffer) {
    this.#bytes = bytes;
    this.#words = new Uint32Array(bytes.buffer, bytes.byteOffset, 2);
    this.#header = new BigUint64Array(bytes.buffer, bytes.byteOffset, 1);
  }

  get state(): number {
    return Atomics.load(this.#words, STATE_WORD) & 0xff;
  }

  /**
   * The sequence, modulo 2^31, that a backend before this one claimed the request with; undefined where the request was
   * taken by nobody.
   */
  get claim(): number | undefined {
    const length = Atomics.load(this.#words, LENGTH_WORD);
    return length >= CLAIMED ? length & SEQUENCE_MASK : undefined;
  }

  /**
   * Copies the request. Call it when the state is SUBMIT.
   * @param out of MAX_COMMAND_BYTES
   * @param isClaimed by a backend before this one: then the length is in the TPM command alone
   */
  take(out: Buffer, isClaimed = false): RingRequest {
    const word = Atomics.load(this.#words, STATE_WORD);
    const announced = Atomics.load(this.#words, LENGTH_WORD);
    const extra = word >>> 24;
    this.#stateWord = word;
    this.#packet = HEADER_BYTES + 4 * extra;
    const locality = (word >>> 8) & 0xff;
    if (!this.#areExtraPages(extra)) return { locality, length: undefined };
    const room = Math.min((1 + extra) * PAGE_BYTES - this.#packet, MAX_COMMAND_BYTES);
    const length = isClaimed ? this.#sizeInCommand() : announced;
    if (length < COMMAND_HEADER_BYTES || length > room) return { locality, length: undefined };
    this.#bytes.copy(out, 0, this.#packet, this.#packet + length);
    return { locality, length };
  }

  /** A backend after this one knows that the request was taken, and after what. @param sequence of what was done last */
  claimAfter(sequence: number): void {
    Atomics.store(this.#words, LENGTH_WORD, (CLAIMED | (sequence % CLAIMED)) >>> 0);
  }

  /** How many bytes of response there is room for. */
  get room(): number {
    const pages = Math.min(1 + (this.#stateWord >>> 24), this.#bytes.length / PAGE_BYTES);
    return pages * PAGE_BYTES - this.#packet;
  }

  /** The response, of at most `room` bytes. The request is gone, and the state is what it was. */
  putResponse(response: Buffer): void {
    this.#bytes.set(response, this.#packet);
  }

  /** The state becomes FINISH, and the length that of the response, in one store. */
  finish(length: number): void {
    const word = ((this.#stateWord & 0xffffff00) | STATE.FINISH) >>> 0;
    Atomics.store(this.#header, 0, (BigInt(word) << 32n) | BigInt(length));
  }

  /** There is no answer: the request was cancelled before it ran. */
  idle(): void {
    const word = (Atomics.load(this.#words, STATE_WORD) & 0xffffff00) | STATE.IDLE;
    Atomics.store(this.#words, STATE_WORD, word >>> 0);
  }

  #areExtraPages(count: number): boolean {
    if ((1 + count) * PAGE_BYTES > this.#bytes.length) return false;
    for (let index = 1; index <= count; index++) {
      if (this.#bytes.readUInt32LE(HEADER_BYTES + 4 * (index - 1)) !== index) return false;
    }
    return true;
  }

  /** The size field of the TPM command (TPM 2.0 library, part 1, section 18). */
  #sizeInCommand(): number {
    return this.#bytes.readUInt32BE(this.#packet + 2);
  }
}

/** Whether something of this sequence came after the claim. @param claim as `RingPage.claim` gives it */
export function isAfterClaim(sequence: number, claim: number): boolean {
  const distance = (sequence - claim) & SEQUENCE_MASK;
  return distance > 0 && distance < CLAIMED / 2;
}
