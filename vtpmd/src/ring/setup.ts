import { fstatSync } from 'node:fs';
import { fcntl } from 'vtpm-common/libc';
import { closeUnknown, isUnixStream } from 'vtpm-common/passed-descriptors';
import { MOST_MESSAGE_BYTES, type PassedMessage } from '../channels/passed-message.js';
import { MOST_PAGES, PAGE_BYTES } from './page.js';

/** The states of a device's two ends (xen/include/public/io/xenbus.h). */
export const XENBUS = { InitWait: 2, Initialised: 3, Connected: 4, Closed: 6 } as const;

const FEATURE = 'feature-protocol-v2';

/** A frontend's ring, both descriptors checked and owned by whoever gets this. */
export interface RingSetup {
  readonly page: number;
  readonly pageBytes: number;
  readonly event: number;
}

/** Why a frontend's ring is not taken; it is told. */
export class RingRefusal extends Error {
  override readonly name = 'RingRefusal';
}

/** A message: `name=value` lines, as Xen's store has nodes, and an empty line. */
export function encodeNodes(nodes: Readonly<Record<string, string | number>>): Buffer {
  const lines = Object.entries(nodes).map(([name, value]) => `${name}=${value}\n`);
  return Buffer.from(`${lines.join('')}\n`);
}

/** @throws RingRefusal where it is not one whole message */
export function decodeNodes(message: Buffer): ReadonlyMap<string, string> {
  const text = message.toString('latin1');
  if (message.length >= MOST_MESSAGE_BYTES || !/^(?:[a-z][a-z0-9-]*=[ -~]*\n)+\n$/.test(text)) {
    throw new RingRefusal('what came is not one message of name=value lines that an empty line ends');
  }
  return new Map(
    text
      .trimEnd()
      .split('\n')
      .map((line) => {
        const at = line.indexOf('=');
        return [line.slice(0, at), line.slice(at + 1)];
      }),
  );
}

/** Of a backend that waits for a frontend. */
export function invitation(): Buffer {
  return encodeNodes({ state: XENBUS.InitWait, [FEATURE]: 1, 'max-pages': MOST_PAGES, localities: 1 });
}

/**
 * Checks what a frontend sent. Where it is refused its descriptors are closed.
 * @throws RingRefusal
 */
export function takeSetup({ bytes, descriptors, isCut }: PassedMessage): RingSetup {
  try {
    const nodes = decodeNodes(bytes);
    if (nodes.get(FEATURE) !== '1') throw new RingRefusal(`a frontend must have ${FEATURE}=1`);
    if (nodes.get('state') !== `${XENBUS.Initialised}`) {
      throw new RingRefusal(`a frontend with a ring has the state ${XENBUS.Initialised}`);
    }
    const [page, event] = descriptors;
    if (page === undefined || event === undefined || descriptors.length !== 2 || isCut) {
      throw new RingRefusal(
        'two descriptors come with the message: the memory of the ring, and the event channel',
      );
    }
    checkEvent(event);
    return { page, event, pageBytes: sizeOfPages(page) };
  } catch (error) {
    for (const fd of descriptors) closeUnknown(fd);
    throw error;
  }
}

const F_GETFL = 3;
const F_GET_SEALS = 1034;
const F_SEAL_SHRINK = 0x2;
/** F_SEAL_WRITE and F_SEAL_FUTURE_WRITE. */
const SEALS_OF_WRITING = 0x8 | 0x10;
const O_ACCMODE = 3;
const O_RDWR = 2;

/**
 * What is mapped must not become shorter: touching what is gone would end the worker (SIGBUS). The seals are asked for
 * before anything else, because only memory has them: fstat(2) of a file elsewhere may take as long as its owner likes.
 * @throws RingRefusal
 */
function sizeOfPages(fd: number): number {
  const seals = fcntl(fd, F_GET_SEALS, 0);
  if (seals < 0) throw new RingRefusal('the memory of the ring is not of memfd_create(2)');
  if ((seals & F_SEAL_SHRINK) === 0) {
    throw new RingRefusal(
      'the memory of the ring could be made smaller: F_SEAL_SHRINK is missing (fcntl(2), F_ADD_SEALS)',
    );
  }
  if ((seals & SEALS_OF_WRITING) !== 0 || (fcntl(fd, F_GETFL, 0) & O_ACCMODE) !== O_RDWR) {
    throw new RingRefusal('the memory of the ring cannot be written');
  }
  const { size } = fstatSync(fd);
  if (size === 0 || size % PAGE_BYTES !== 0 || size > MOST_PAGES * PAGE_BYTES) {
    throw new RingRefusal(
      `the memory of the ring has ${size} bytes; 1 to ${MOST_PAGES} pages of ${PAGE_BYTES} are possible`,
    );
  }
  return size;
}

/** @throws RingRefusal */
function checkEvent(fd: number): void {
  if (!isUnixStream(fd)) {
    throw new RingRefusal('the event channel is not one end of a pair of unix stream sockets');
  }
}
