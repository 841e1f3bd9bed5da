import { closeSync } from 'node:fs';
import type { Socket } from 'node:net';
import { koffi } from 'vtpm-common/libc';

const libc = koffi.load('libc.so.6');
const makeSocket = libc.func('int socket(int domain, int type, int protocol)');
const send = libc.func('long send(int fd, void *buffer, size_t length, int flags)');
const recv = libc.func('long recv(int fd, void *buffer, size_t length, int flags)');

const AF_INET = 2;
const AF_NETLINK = 16;
const SOCK_RAW_CLOEXEC = 3 | 0o2000000;
const NETLINK_SOCK_DIAG = 4;
const SOCK_DIAG_BY_FAMILY = 20;
const NLM_F_REQUEST = 1;
const IPPROTO_TCP = 6;

/** struct nlmsghdr */
const HEADER_BYTES = 16;
/** struct inet_diag_req_v2: family, protocol, extensions, padding, u32 states, struct inet_diag_sockid of 48 bytes */
const REQUEST_BYTES = 56;
const SOCKID = HEADER_BYTES + 8;
/** Of the uid in struct inet_diag_msg: four bytes, the sockid, expires, rqueue, wqueue. */
const UID = HEADER_BYTES + 4 + 48 + 12;
const INODE = UID + 4;

/**
 * Of which user the other end of a connection over the loopback interface is. Unix sockets have permission bits for that,
 * ports do not. One lookup in the kernel's table, however many sockets there are (sock_diag(7)).
 * @returns undefined where the kernel does not know it, or that end is closed: it belongs to nobody then and is shown as root's
 */
export function peerUid({
  localPort,
  remotePort,
}: Pick<Socket, 'localPort' | 'remotePort'>): number | undefined {
  if (localPort === undefined || remotePort === undefined) return undefined;
  const request = Buffer.alloc(HEADER_BYTES + REQUEST_BYTES);
  request.writeUInt32LE(request.length, 0);
  request.writeUInt16LE(SOCK_DIAG_BY_FAMILY, 4);
  request.writeUInt16LE(NLM_F_REQUEST, 6);
  request.writeUInt8(AF_INET, HEADER_BYTES);
  request.writeUInt8(IPPROTO_TCP, HEADER_BYTES + 1);
  // In any state.
  request.writeUInt32LE(0xffffffff, HEADER_BYTES + 4);
  // Its own end is what is looked for.
  request.writeUInt16BE(remotePort, SOCKID);
  request.writeUInt16BE(localPort, SOCKID + 2);
  request.set(LOOPBACK, SOCKID + 4);
  request.set(LOOPBACK, SOCKID + 20);
  // No cookie.
  request.fill(0xff, SOCKID + 40);
  const fd = Number(makeSocket(AF_NETLINK, SOCK_RAW_CLOEXEC, NETLINK_SOCK_DIAG));
  if (fd < 0) return undefined;
  try {
    const answer = Buffer.alloc(4096);
    if (Number(send(fd, request, request.length, 0)) !== request.length) return undefined;
    // The kernel has answered before send returns.
    const length = Number(recv(fd, answer, answer.length, MSG_DONTWAIT));
    if (length < INODE + 4 || answer.readUInt16LE(4) !== SOCK_DIAG_BY_FAMILY) return undefined;
    // One that its process still holds has an inode, also where it has ended its half.
    return answer.readUInt32LE(INODE) === 0 ? undefined : answer.readUInt32LE(UID);
  } finally {
    closeSync(fd);
  }
}

const LOOPBACK = Buffer.of(127, 0, 0, 1);
const MSG_DONTWAIT = 0x40;
