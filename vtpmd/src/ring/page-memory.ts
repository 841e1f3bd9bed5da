import { koffi } from 'vtpm-common/libc';
import { viewOf } from '../engine/libtpms.js';
import { VtpmdError } from '../error.js';
import { MOST_PAGES, PAGE_BYTES } from './page.js';

const libc = koffi.load('libc.so.6');
const mmap = libc.func(
  'uint64_t mmap(void *at, size_t length, int protection, int flags, int fd, long offset)',
);

const PROT_NONE = 0;
const PROT_READ_WRITE = 1 | 2;
const MAP_SHARED = 0x01;
const MAP_PRIVATE = 0x02;
const MAP_FIXED = 0x10;
const MAP_ANONYMOUS = 0x20;
const MAP_NORESERVE = 0x4000;
const MAP_FAILED = 0xffffffffffffffffn;
/** Of this process alone; nothing is set aside for it. */
const MAP_OWN = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
const RANGE_BYTES = MOST_PAGES * PAGE_BYTES;

/**
 * A ring's memory, mapped into a range of this process's addresses. The range is never given back but used for another ring,
 * and where no ring is mapped it is memory of this process alone. So a view of it is valid for the life of the process:
 * whoever still used one after its ring was closed would read zeros instead of ending the worker, and no collection of
 * garbage matters.
 */
export class MappedPages {
  static readonly #free: MappedPages[] = [];
  readonly #address: bigint;
  readonly #view: Buffer;
  #bytes = 0;

  private constructor() {
    this.#address = map(null, PROT_NONE, MAP_OWN, -1, RANGE_BYTES);
    this.#view = viewOf(this.#address, RANGE_BYTES);
  }

  /**
   * Maps the memory behind `fd`, which may be closed then.
   * @param bytes whole pages, MOST_PAGES at most, which the memory has for good
   * @throws VtpmdError `internal` where the kernel does not map it
   */
  static of(fd: number, bytes: number): MappedPages {
    const pages = MappedPages.#free.pop() ?? new MappedPages();
    try {
      map(pages.#address, PROT_READ_WRITE, MAP_SHARED | MAP_FIXED, fd, bytes);
    } catch (error) {
      MappedPages.#free.push(pages);
      throw error;
    }
    pages.#bytes = bytes;
    return pages;
  }

  get bytes(): Buffer {
    return this.#view.subarray(0, this.#bytes);
  }

  /** The ring is not mapped any more. */
  release(): void {
    map(this.#address, PROT_READ_WRITE, MAP_OWN | MAP_FIXED, -1, RANGE_BYTES);
    MappedPages.#free.push(this);
  }
}

function map(at: bigint | null, protection: number, flags: number, fd: number, bytes: number): bigint {
  const address = BigInt(mmap(at, bytes, protection, flags, fd, 0) as bigint | number);
  if (address === MAP_FAILED) {
    throw new VtpmdError('internal', `memory cannot be mapped (errno ${koffi.errno()})`);
  }
  return address;
}
