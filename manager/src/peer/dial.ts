import {
  type ClientHttp2Session,
  type ClientHttp2Stream,
  connect,
  constants,
  type IncomingHttpHeaders,
} from 'node:http2';
import { connect as connectTcp, type Socket } from 'node:net';
import { connect as connectTls, type TLSSocket } from 'node:tls';
import type { Logger } from 'vtpm-common';
import { bytesEqual, EXCHANGE_PATH, frameMessage, MessageReader, type Peer } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import type { TrustStore } from '../trust/trust-configuration.js';
import { addressText, type PeerAddress, parseAddress } from './address.js';
import { closedBy, type PeerChannel, StreamChannel } from './channel.js';
import type { HostIdentity } from './identity.js';
import { watchPeer } from './still-enrolled.js';
import { bindingOf, provenKey, tlsOptions } from './tls.js';

export interface DialOptions {
  readonly identity: HostIdentity;
  readonly trust: Pick<TrustStore, 'peerById' | 'onPeersChanged'>;
  readonly log: Logger;
  readonly limits?: Partial<DialLimits>;
}

export interface DialLimits {
  /** Milliseconds for one address, from the first packet to the first frame of the other host. */
  readonly addressMs: number;
  /** Milliseconds between two questions whether the other host is there still. */
  readonly pingMs: number;
  readonly sendTimeoutMs: number;
}

const LIMITS: DialLimits = { addressMs: 5_000, pingMs: 10_000, sendTimeoutMs: 30_000 };

/**
 * A channel to a peer: its addresses are tried in their order, and the first on which its TLS key is proven is taken.
 * @throws ManagerError `peer-unreachable`, which says what became of each address; `peer-closed` where one of them is the
 * peer's, its key proven there, and nothing came of it
 */
export async function dialPeer(peer: Peer, options: DialOptions): Promise<PeerChannel> {
  const limits = { ...LIMITS, ...options.limits };
  const failures: string[] = [];
  let isThere = false;
  const onProven = (): void => {
    isThere = true;
  };
  for (const text of peer.addresses) {
    const address = parseAddress(text);
    try {
      return await dial(peer, address, options, limits, onProven);
    } catch (error) {
      const why = error instanceof ManagerError ? error.message : reasonOf(error as NodeJS.ErrnoException);
      failures.push(`${addressText(address)}: ${why}`);
    }
  }
  const tried = failures.length === 0 ? 'it has no address' : failures.join('; ');
  throw new ManagerError(
    isThere ? 'peer-closed' : 'peer-unreachable',
    `${peer.name} cannot be reached: ${tried}; to change its addresses: vtpmctl peer change ${peer.name} --address HOST:PORT`,
  );
}

async function dial(
  peer: Peer,
  address: PeerAddress,
  options: DialOptions,
  limits: DialLimits,
  onProven: () => void,
): Promise<PeerChannel> {
  const tcp = connectTcp({ ...address, noDelay: true });
  tcp.on('error', () => undefined);
  let late: ManagerError | undefined;
  const timer = setTimeout(() => {
    late = new ManagerError('peer-late', `no answer within ${limits.addressMs} ms`);
    tcp.destroy();
  }, limits.addressMs);
  try {
    await event(tcp, 'connect');
    const socket = await verified(tcp, peer, options.identity);
    onProven();
    const session = await settled(socket);
    return channelOver(session, peer, options, limits);
  } catch (error) {
    tcp.destroy();
    throw late ?? error;
  } finally {
    clearTimeout(timer);
  }
}

/** The only way to a socket on which anything is sent: the key is checked before it is given out. */
async function verified(tcp: Socket, peer: Peer, identity: HostIdentity): Promise<TLSSocket> {
  // The certificate is self-signed, and nobody vouches for it but the operator, who has taken over its key.
  const socket = connectTls({ socket: tcp, ...tlsOptions(identity.tls), rejectUnauthorized: false });
  socket.on('error', () => undefined);
  await event(socket, 'secureConnect');
  const key = provenKey(socket);
  if (key && bytesEqual(key, peer.tlsKey)) return socket;
  socket.destroy();
  const found = key ? `its TLS key is ${key.toString('hex')}` : 'it proves no key as peers have it';
  throw new ManagerError('unknown-peer', `another host answers: ${found}`);
}

/** The other host speaks first of all when it has found this one among its peers. */
async function settled(socket: TLSSocket): Promise<ClientHttp2Session> {
  const session = connect('https://peer', {
    createConnection: () => socket,
    settings: { enablePush: false },
  });
  session.on('error', () => undefined);
  try {
    await event(session, 'remoteSettings');
    return session;
  } catch (cause) {
    throw new ManagerError(
      'peer-closed',
      'it closes the connection: it does not know this host (there: vtpmctl peer list, vtpmctl peer add), or has too many connections',
      { cause },
    );
  }
}

function channelOver(
  session: ClientHttp2Session,
  peer: Peer,
  { identity, trust, log }: DialOptions,
  limits: DialLimits,
): PeerChannel {
  const stream = session.request(
    {
      ':method': 'POST',
      ':path': EXCHANGE_PATH,
      'content-type': 'application/grpc',
      te: 'trailers',
    },
    { endStream: false },
  );
  const channel = new StreamChannel(
    {
      peer: () => watched.peer(),
      binding: bindingOf(identity.tls.publicKey, peer.tlsKey),
      sendTimeoutMs: limits.sendTimeoutMs,
    },
    {
      write: (message, done) => stream.write(frameMessage(message), done),
      hold: (isHeld) => (isHeld ? stream.pause() : stream.resume()),
      // Who closes it before a message has gone does not want it to go.
      end: () => (stream.writableLength > 0 ? stream.close(constants.NGHTTP2_CANCEL) : stream.end()),
    },
  );
  const watched = watchPeer(peer, trust, (error) => channel.close(error));
  receive(stream, channel);
  const stop = keepAsking(session, limits.pingMs, (error) => channel.over(error, true));
  void channel.closed.then((reason) => {
    stop();
    watched.end();
    log.debug(
      { peer: peer.name, reason: reason.code },
      `a connection to a peer has ended: ${reason.message}`,
    );
    // What was written leaves first; who does not take it in a second never will.
    session.close();
    setTimeout(() => session.destroy(), CLOSE_MS).unref();
  });
  return channel;
}

/** Milliseconds that a closed connection has for what is on its way. */
const CLOSE_MS = 1_000;

function receive(stream: ClientHttp2Stream, channel: StreamChannel): void {
  const reader = new MessageReader();
  let status: ManagerError | undefined;
  let isRead = false;
  const note = (headers: IncomingHttpHeaders): void => {
    status = statusIn(headers) ?? status;
    finish();
  };
  // Where messages are left to be read, the status is there before they are.
  const finish = (): void => {
    if (status && isRead) channel.over(status, true);
  };
  stream.on('response', note);
  stream.on('trailers', note);
  stream.on('data', (chunk: Buffer) => {
    try {
      for (const message of reader.push(chunk)) channel.take(message);
    } catch (error) {
      channel.over(closedBy((error as Error).message), true);
    }
  });
  stream.on('end', () => {
    isRead = true;
    finish();
  });
  stream.on('error', (error) => {
    status ??= closedBy(`the connection broke: ${error.message}`);
  });
  stream.on('close', () => channel.over(status ?? closedBy('the connection broke')));
}

/** Printable, and not longer than a line. */
const clean = (text: string): string => text.replace(/[^ -~]/g, '?').slice(0, 300);

/** What the headers or trailers say of the end; undefined where they say nothing of it. */
function statusIn(headers: IncomingHttpHeaders): ManagerError | undefined {
  const httpStatus = (headers as { readonly ':status'?: number })[':status'];
  if (httpStatus !== undefined && httpStatus !== 200) return closedBy(`it answers HTTP ${httpStatus}`);
  const status = headers['grpc-status'];
  if (status === undefined) return undefined;
  if (status === '0') return closedBy('the other host has ended it');
  const message = String(headers['grpc-message'] ?? '');
  let text = message;
  try {
    text = decodeURIComponent(message);
  } catch {
    // Shown as it came.
  }
  return closedBy(`the other host has ended it: ${clean(text)}`);
}

/** A host that is gone without a word is found out: TCP alone would wait for hours. @returns ends it */
function keepAsking(
  session: ClientHttp2Session,
  pingMs: number,
  onLost: (error: ManagerError) => void,
): () => void {
  let isAnswered = true;
  const timer = setInterval(() => {
    if (!isAnswered) return onLost(closedBy(`the other host has not answered for ${pingMs} ms`));
    isAnswered = false;
    if (session.destroyed) return;
    session.ping((error) => {
      isAnswered = error === null;
    });
  }, pingMs);
  timer.unref();
  return () => clearInterval(timer);
}

/** @throws what the emitter fails or is destroyed with */
function event(emitter: Socket | ClientHttp2Session, name: string): Promise<void> {
  return new Promise((resolve, reject) => {
    let failure: Error | undefined;
    emitter.once('error', (error: Error) => {
      failure = error;
      reject(error);
    });
    emitter.once(name, () => resolve());
    emitter.once('close', () => reject(failure ?? closedBy('it closes the connection')));
  });
}

function reasonOf({ code, message }: NodeJS.ErrnoException): string {
  switch (code) {
    case 'ECONNREFUSED':
      return 'nothing listens there (its setting peer-listen)';
    case 'EHOSTUNREACH':
    case 'ENETUNREACH':
    case 'EAFNOSUPPORT':
    case 'EPERM':
    case 'EACCES':
      return 'there is no way to it: no route, or the service has no network (docs/peers.md)';
    case 'ENOTFOUND':
      return 'there is no such host name';
    case 'ETIMEDOUT':
      return 'no answer';
    default:
      return clean(message);
  }
}
