import { closeSync } from 'node:fs';
import { mapOwn, mapShared, sealedMemory, viewOf } from '../system-calls.js';
import { PAGE_BYTES } from './page.js';

/** The largest ring that backends take. */
export const MOST_PAGES = 4;
const RANGE_BYTES = MOST_PAGES * PAGE_BYTES;

interface Range {
  readonly address: bigint;
  readonly view: Buffer;
}

/** Addresses that no ring is mapped to at present. None is ever given back: a view of what is gone would end the process. */
const free: Range[] = [];

/** Memory of a ring, mapped here, with a descriptor to pass on. */
export class RingMemory {
  /** To be passed to the backend; `passed` closes it. */
  readonly fd: number;
  readonly bytes: Buffer;
  readonly #range: Range;
  #isReleased = false;

  /** @throws FrontendError `internal` */
  constructor(pages: number) {
    const bytes = pages * PAGE_BYTES;
    this.fd = sealedMemory('vtpm-ring', bytes);
    try {
      this.#range = free.pop() ?? newRange();
      mapShared(this.fd, bytes, this.#range.address);
      this.bytes = this.#range.view.subarray(0, bytes);
    } catch (error) {
      closeSync(this.fd);
      throw error;
    }
  }

  /** The backend has the descriptor. */
  passed(): void {
    closeSync(this.fd);
  }

  release(): void {
    if (this.#isReleased) return;
    this.#isReleased = true;
    mapOwn(RANGE_BYTES, this.#range.address);
    free.push(this.#range);
  }
}

function newRange(): Range {
  const whole = sealedMemory('vtpm-ring', RANGE_BYTES);
  try {
    const address = mapShared(whole, RANGE_BYTES);
    return { address, view: viewOf(address, RANGE_BYTES) };
  } finally {
    closeSync(whole);
  }
}
