import type { Socket } from 'node:net';
import { connectStream, DEADLINE_MS, type SocketOptions, Stream, StreamTransport } from './stream.js';
import type { Transport } from './transport.js';

/**
 * A TPM behind a unix stream socket that carries bare commands and answers, as swtpm's data channel does.
 * @throws TpmError `transport` where nobody accepts the connection
 */
export async function openSocket(path: string, options: SocketOptions = {}): Promise<Transport> {
  return new StreamTransport(await connectStream({ path }, options));
}

/**
 * The same over TCP, as `swtpm socket --server type=tcp` serves it (without `disconnect`: that ends the connection after
 * each answer). Nothing hides or proves the bytes on the way but the sessions of the commands: an authorisation by
 * password goes in clear.
 * @param address.host an IPv4 or IPv6 address, or a name
 * @throws TpmError `transport` where nobody accepts the connection
 */
export async function openTcp(
  address: { readonly host: string; readonly port: number },
  options: SocketOptions = {},
): Promise<Transport> {
  return new StreamTransport(await connectStream(address, options));
}

/** The same over a connection that is there already, and is the transport's from now on. @param name for messages */
export function overSocket(socket: Socket, name: string, options: SocketOptions = {}): Transport {
  return new StreamTransport(new Stream(name, socket, options.deadline ?? DEADLINE_MS));
}
