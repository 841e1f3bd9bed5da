import { CHECKPOINT_LAYOUT as LAYOUT } from 'vtpm-common/checkpoint-layout';
import { koffi } from 'vtpm-common/libc';
import { viewOf } from '../engine/libtpms.js';
import { VtpmdError } from '../error.js';

const libc = koffi.load('libc.so.6');
const mmap = libc.func(
  'uint64_t mmap(void *at, size_t length, int protection, int flags, int fd, long offset)',
);

const PROT_READ_WRITE = 1 | 2;
const MAP_SHARED = 1;
const MAP_FAILED = 0xffffffffffffffffn;

/** Index of a slot in CHECKPOINT_LAYOUT. */
export type Slot = 0 | 1 | 2;
export const SLOTS: readonly Slot[] = [0, 1, 2];

/** A unit as it lies in its slot; `sealed` is a copy. */
export interface SlotContent {
  readonly sequence: number;
  readonly sealed: Buffer;
}

/** Where the marks of one pipe are. */
interface MarkLayout {
  readonly begun: number;
  readonly piped: number;
  readonly connection: number;
  readonly commandLength: number;
}

/** The answer that went, or was about to go, through the pipe. */
export interface PipeMark {
  readonly begun: number;
  readonly piped: number;
  readonly connection: number;
  readonly commandLength: number;
}

/** What is noted of the answers that go through one pipe. A worker may end between any two of the stores. */
export interface PipeMarks {
  /** Before an answer is written into the empty pipe. */
  begin(number: number, connection: number, commandLength: number): void;
  /** The answer is wholly in the pipe. */
  piped(number: number): void;
  mark(): PipeMark;
}

/** The newest answer that was put into the page of a ring; `response` is a copy. */
export interface RingAnswer {
  readonly number: number;
  readonly connection: number;
  readonly response: Buffer;
}

/**
 * The memory of a VM run that outlives its workers; see CHECKPOINT_LAYOUT. A worker may end between any two of these
 * stores: each method says in which order they are made.
 */
export class CheckpointMemory {
  readonly #bytes: Buffer;
  /** Aligned words for what must become visible in order: `Atomics` keeps the compiler from moving the stores. */
  readonly #words: BigUint64Array;
  readonly #halves: Uint32Array;

  /** Maps `fd`, which may be closed then. @throws VtpmdError `internal` */
  static map(fd: number): CheckpointMemory {
    const address = BigInt(mmap(null, LAYOUT.bytes, PROT_READ_WRITE, MAP_SHARED, fd, 0) as bigint | number);
    if (address === MAP_FAILED) throw new VtpmdError('internal', 'the checkpoint memory cannot be mapped');
    return new CheckpointMemory(viewOf(address, LAYOUT.bytes));
  }

  private constructor(bytes: Buffer) {
    this.#bytes = bytes;
    const { buffer, byteOffset } = bytes;
    this.#words = new BigUint64Array(buffer, byteOffset, LAYOUT.bytes / 8);
    this.#halves = new Uint32Array(buffer, byteOffset, LAYOUT.bytes / 4);
  }

  /** Of the pipe for the answers of the TPM. */
  get marks(): PipeMarks {
    return this.#marksAt(LAYOUT);
  }

  /** Of the pipe for the answers to a VMM's control requests. */
  get controlMarks(): PipeMarks {
    return this.#marksAt(LAYOUT.control);
  }

  mark(): PipeMark {
    return this.marks.mark();
  }

  #marksAt({ begun, piped, connection, commandLength }: MarkLayout): PipeMarks {
    const halves = this.#halves;
    return {
      begin: (number, to, length) => {
        Atomics.store(halves, connection / 4, to);
        Atomics.store(halves, commandLength / 4, length);
        this.#setWord(begun, number);
      },
      piped: (number) => this.#setWord(piped, number),
      mark: () => ({
        begun: this.#word(begun),
        piped: this.#word(piped),
        connection: Atomics.load(halves, connection / 4),
        commandLength: Atomics.load(halves, commandLength / 4),
      }),
    };
  }

  /** The locality that the VMM has chosen. */
  get locality(): number {
    return Atomics.load(this.#halves, LAYOUT.locality / 4);
  }

  set locality(locality: number) {
    Atomics.store(this.#halves, LAYOUT.locality / 4, locality);
  }

  /** The control connection from which a part of a request was taken, so that nobody else can do it; 0 for none. */
  get torn(): number {
    return Atomics.load(this.#halves, LAYOUT.torn / 4);
  }

  set torn(connection: number) {
    Atomics.store(this.#halves, LAYOUT.torn / 4, connection);
  }

  /** What a VMM brought in so far; see BroughtIn. */
  get broughtIn(): number {
    return Atomics.load(this.#halves, LAYOUT.broughtIn / 4);
  }

  set broughtIn(note: number) {
    Atomics.store(this.#halves, LAYOUT.broughtIn / 4, note);
  }

  /** The TPM was on its way to another host when its VMM switched it off. */
  get isSwitchedOff(): boolean {
    return Atomics.load(this.#halves, LAYOUT.switchedOff / 4) !== 0;
  }

  set isSwitchedOff(is: boolean) {
    Atomics.store(this.#halves, LAYOUT.switchedOff / 4, is ? 1 : 0);
  }

  /** @param half 0 is that to the permanent state, 1 that to the volatile one @returns undefined where none is there */
  reference(half: 0 | 1): Buffer | undefined {
    const at = LAYOUT.references[half];
    const length = this.#word(at);
    if (length === 0 || length > LAYOUT.referenceBytes) return undefined;
    return Buffer.from(this.#bytes.subarray(at + 8, at + 8 + length));
  }

  keepReference(half: 0 | 1, blob: Buffer): void {
    const at = LAYOUT.references[half];
    this.#setWord(at, 0);
    this.#bytes.set(blob, at + 8);
    this.#setWord(at, blob.length);
  }

  dropReferences(): void {
    for (const at of LAYOUT.references) {
      this.#setWord(at, 0);
      this.#bytes.fill(0, at + 8, at + 8 + LAYOUT.referenceBytes);
    }
  }

  /** Before an answer is put into the page of a ring, where it takes the place of its command. */
  keepRingAnswer(number: number, connection: number, response: Buffer): void {
    const at = LAYOUT.ringAnswer;
    this.#setWord(at, 0);
    this.#bytes.set(response, at + LAYOUT.ringAnswerHeader);
    Atomics.store(this.#halves, (at + 8) / 4, connection);
    Atomics.store(this.#halves, (at + 12) / 4, response.length);
    this.#setWord(at, number);
  }

  /** @returns undefined where nothing, or nothing possible, is there */
  ringAnswer(): RingAnswer | undefined {
    const at = LAYOUT.ringAnswer;
    const number = this.#word(at);
    const length = Atomics.load(this.#halves, (at + 12) / 4);
    if (number === 0 || length > LAYOUT.ringAnswerBytes) return undefined;
    const start = at + LAYOUT.ringAnswerHeader;
    return {
      number,
      connection: Atomics.load(this.#halves, (at + 8) / 4),
      response: Buffer.from(this.#bytes.subarray(start, start + length)),
    };
  }

  /** The answer is wholly in its page, or nobody waits for it. */
  dropRingAnswer(length: number): void {
    const at = LAYOUT.ringAnswer;
    this.#setWord(at, 0);
    const start = at + LAYOUT.ringAnswerHeader;
    this.#bytes.fill(0, start, start + length);
  }

  /** Words in which connections note that a command of theirs has no answer yet, where nothing is check-pointed. */
  get taken(): Uint32Array {
    return this.#halves.subarray(LAYOUT.taken / 4, LAYOUT.taken / 4 + LAYOUT.takenCount);
  }

  /** Room for a unit in that slot. From now on the slot holds nothing. */
  open(slot: Slot): Buffer {
    const offset = offsetOf(slot);
    this.#setWord(offset, 0);
    return this.#bytes.subarray(offset + LAYOUT.slotHeader, offset + LAYOUT.slotBytes);
  }

  /** The unit in the room is whole. The length first: with its sequence the slot is valid. */
  close(slot: Slot, sequence: number, length: number): void {
    const offset = offsetOf(slot);
    Atomics.store(this.#halves, (offset + 8) / 4, length);
    this.#setWord(offset, sequence);
  }

  /** @returns undefined where nothing, or nothing possible, is in the slot */
  read(slot: Slot): SlotContent | undefined {
    const offset = offsetOf(slot);
    const sequence = this.#word(offset);
    const length = Atomics.load(this.#halves, (offset + 8) / 4);
    if (sequence === 0 || length > LAYOUT.slotBytes - LAYOUT.slotHeader) return undefined;
    const start = offset + LAYOUT.slotHeader;
    return { sequence, sealed: Buffer.from(this.#bytes.subarray(start, start + length)) };
  }

  #setWord(offset: number, value: number): void {
    Atomics.store(this.#words, offset / 8, BigInt(value));
  }

  #word(offset: number): number {
    const value = Number(Atomics.load(this.#words, offset / 8));
    return Number.isSafeInteger(value) ? value : 0;
  }
}

function offsetOf(slot: Slot): number {
  return LAYOUT.slots[slot];
}
