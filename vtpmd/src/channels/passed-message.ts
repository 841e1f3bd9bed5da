import { koffi } from 'vtpm-common/libc';
import { allocate, viewOf } from '../engine/libtpms.js';
import { setPeekOffset } from './socket-io.js';

const libc = koffi.load('libc.so.6');
const recvmsg = libc.func('long recvmsg(int fd, void *header, int flags)');

const MSG_PEEK = 2;
const MSG_CTRUNC = 8;
const MSG_DONTWAIT = 0x40;
const MSG_CMSG_CLOEXEC = 0x40000000;
const SOL_SOCKET = 1;
const SCM_RIGHTS = 1;
const EAGAIN = 11;

export const MOST_MESSAGE_BYTES = 512;
/** More than any message should have, so that one with too many is told from one with enough. */
const MOST_DESCRIPTORS = 4;
const CONTROL_HEADER_BYTES = 16;
const CONTROL_BYTES = CONTROL_HEADER_BYTES + 4 * MOST_DESCRIPTORS;

// struct msghdr (56 bytes), one struct iovec (16), the control buffer and the message, at addresses that stay.
const IOV = 56;
const CONTROL = IOV + 16;
const MESSAGE = CONTROL + CONTROL_BYTES;
const TOTAL = MESSAGE + MOST_MESSAGE_BYTES;

/** What a peer sent in one piece. The receiver closes the descriptors. */
export interface PassedMessage {
  readonly bytes: Buffer;
  readonly descriptors: readonly number[];
  /** There were more descriptors than any message should have, or than this process may have. */
  readonly isCut: boolean;
}

let memory: { readonly address: bigint; readonly view: Buffer } | undefined;

/**
 * Looks at the message at the head of a unix stream socket, where it stays: each look gives descriptors anew (unix(7),
 * SCM_RIGHTS; recv(2), MSG_PEEK). So they outlive a process that has taken them.
 * @param most bytes of it @returns undefined where there is none; `end` where there will be none
 */
export function peekMessage(fd: number, most = MOST_MESSAGE_BYTES): PassedMessage | 'end' | undefined {
  memory ??= prepare();
  const { address, view } = memory;
  view.writeBigUInt64LE(BigInt(Math.min(most, MOST_MESSAGE_BYTES)), IOV + 8);
  view.writeBigUInt64LE(BigInt(CONTROL_BYTES), 40);
  view.writeInt32LE(0, 48);
  view.fill(0, CONTROL, MESSAGE);
  const length = Number(recvmsg(fd, address, MSG_PEEK | MSG_DONTWAIT | MSG_CMSG_CLOEXEC));
  if (length < 0) return koffi.errno() === EAGAIN ? undefined : 'end';
  if (length === 0) return 'end';
  return {
    bytes: Buffer.from(view.subarray(MESSAGE, MESSAGE + length)),
    descriptors: descriptorsIn(view.subarray(CONTROL, MESSAGE)),
    isCut: (view.readInt32LE(48) & MSG_CTRUNC) !== 0,
  };
}

/**
 * Copies of the descriptors that came along with the first `length` bytes; bytes and descriptors stay in the socket, and its
 * peek offset is behind these bytes then. Of one message there are MOST_DESCRIPTORS at most.
 */
export function peekDescriptors(fd: number, length: number): number[] {
  setPeekOffset(fd, 0);
  const found: number[] = [];
  // A receive ends where descriptors came along.
  for (let there = 0; there < length; ) {
    const message = peekMessage(fd, length - there);
    if (message === undefined || message === 'end') break;
    there += message.bytes.length;
    found.push(...message.descriptors);
  }
  return found;
}

function prepare(): { readonly address: bigint; readonly view: Buffer } {
  const address = allocate(TOTAL);
  const view = viewOf(address, TOTAL).fill(0);
  view.writeBigUInt64LE(address + BigInt(MESSAGE), IOV);
  view.writeBigUInt64LE(address + BigInt(IOV), 16);
  view.writeBigUInt64LE(1n, 24);
  view.writeBigUInt64LE(address + BigInt(CONTROL), 32);
  return { address, view };
}

/** struct cmsghdr: u64 length with this header, int level, int type; then the descriptors. */
function descriptorsIn(control: Buffer): number[] {
  const length = Number(control.readBigUInt64LE(0));
  const isRights = control.readInt32LE(8) === SOL_SOCKET && control.readInt32LE(12) === SCM_RIGHTS;
  if (!isRights || length > control.length) return [];
  return Array.from({ length: (length - CONTROL_HEADER_BYTES) >> 2 }, (_, index) =>
    control.readInt32LE(CONTROL_HEADER_BYTES + 4 * index),
  );
}
