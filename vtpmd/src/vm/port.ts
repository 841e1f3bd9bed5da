import { Socket, type SocketConstructorOpts } from 'node:net';

/** libuv's stream over any descriptor that can be polled, which Node gives out for pipes and sockets only. */
interface PipeWrap {
  Pipe: new (type: number) => { open(fd: number): number };
  constants: { SOCKET: number };
}

/** A virtio-serial port as a stream. @param fd open for reading and writing @throws Error where it cannot be polled */
export function openPort(fd: number): Socket {
  const { binding } = process as unknown as { binding(name: 'pipe_wrap'): PipeWrap };
  const { Pipe, constants } = binding('pipe_wrap');
  const handle = new Pipe(constants.SOCKET);
  const failure = handle.open(fd);
  if (failure !== 0) throw new Error(`the port to the host cannot be opened (${failure})`);
  return new Socket({ handle, readable: true, writable: true } as SocketConstructorOpts);
}
