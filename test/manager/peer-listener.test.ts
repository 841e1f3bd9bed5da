import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { type ClientHttp2Session, type ClientHttp2Stream, connect as connectHttp2 } from 'node:http2';
import { connect, createServer, type Socket } from 'node:net';
import {
  type ConnectionOptions,
  connect as connectTls,
  createServer as createTlsServer,
  type TLSSocket,
} from 'node:tls';
import fc from 'fast-check';
import { tlsIdentity } from 'vtpm-manager/peer/certificate';
import type { PeerLimits } from 'vtpm-manager/peer/limits';
import { tlsOptions } from 'vtpm-manager/peer/tls';
import { EXCHANGE_PATH, frameMessage, type Peer } from 'vtpm-proto';
import { PeerHost } from '../support/peer-hosts.js';
import { until } from '../support/until.js';
import { refused } from './ownership-fixture.js';

const FAST: Partial<PeerLimits> = { refusalPauseMs: 10 };

describe('the listener for other hosts', () => {
  let a: PeerHost;
  let b: PeerHost;
  const open: Socket[] = [];

  beforeEach(async () => {
    [a, b] = [await PeerHost.create('a'), await PeerHost.create('b')];
  });
  afterEach(async () => {
    for (const socket of open.splice(0)) socket.destroy();
    await b.close();
  });

  async function meet(limits: Partial<PeerLimits> = {}): Promise<Peer> {
    await b.listen({ ...FAST, ...limits });
    await b.add(a);
    return await a.add(b);
  }

  function kept<T extends Socket>(socket: T): T {
    socket.on('error', () => undefined);
    open.push(socket);
    return socket;
  }

  /** As `a` unless `options` say otherwise; whatever the listener shows is taken. */
  function tls(options: ConnectionOptions = {}): TLSSocket {
    const all = {
      ...tlsOptions(a.identity.tls),
      rejectUnauthorized: false,
      port: b.port,
      host: '127.0.0.1',
      ...options,
    };
    return kept(connectTls(all));
  }

  /** A connection that was let in: the first frame of HTTP/2 came. */
  async function admitted(options: ConnectionOptions = {}): Promise<TLSSocket> {
    const socket = tls(options);
    await new Promise<void>((resolve, reject) => {
      socket.once('data', () => resolve());
      socket.once('close', () => reject(new Error('it was closed')));
    });
    return socket;
  }

  /** A connection of a known peer, for calls that its own code would not make. */
  function caller(): ClientHttp2Session {
    const http2 = connectHttp2('https://peer', { createConnection: () => tls() });
    return http2.on('error', () => undefined);
  }

  const call = (http2: ClientHttp2Session, path = EXCHANGE_PATH): ClientHttp2Stream =>
    http2.request({ ':method': 'POST', ':path': path, 'content-type': 'application/grpc', te: 'trailers' });

  /** What it is told at its end. */
  function statusOf(stream: ClientHttp2Stream): Promise<Record<string, string>> {
    return new Promise((resolve) => {
      for (const name of ['response', 'trailers'] as const) {
        stream.on(name, (headers: Record<string, string>) => {
          if (headers['grpc-status'] !== undefined) resolve(headers);
        });
      }
      stream.on('error', () => undefined);
      stream.on('close', () => resolve({}));
    });
  }

  /** Resolves with all that came before it was closed. */
  async function closed(socket: Socket): Promise<Buffer> {
    const chunks: Buffer[] = [];
    socket.on('data', (chunk: Buffer) => chunks.push(chunk));
    await new Promise<void>((resolve) => {
      if (socket.closed) resolve();
      else socket.once('close', () => resolve());
    });
    return Buffer.concat(chunks);
  }

  const refusals = () =>
    b.audited.map(({ action, verdict, reason }) => `${action} ${verdict} ${reason?.code}`);

  describe('closes, before it has read or said anything, a connection', () => {
    async function isRefused(socket: Socket, reason: string): Promise<void> {
      assert.equal((await closed(socket)).length, 0, 'nothing of HTTP/2 came');
      await until('it is in the log', () => b.audited.length > 0);
      assert.deepEqual(refusals(), [`peer-connect refused ${reason}`]);
      assert.equal(b.sessions.length, 0);
      // Who is known comes in as before.
      (await a.dial(a.trust.peerNamed('b'))).close();
    }

    it('of a host that is no peer', async () => {
      await meet();
      const other = tlsIdentity(randomBytes(32));
      await isRefused(tls(tlsOptions(other)), 'unknown-peer');
      assert.deepEqual(b.audited[0]?.facts, {
        from: '127.0.0.1',
        key: other.publicKey.toString('hex'),
      });
    });

    it('of a host with all that is known of a peer but its TLS key', async () => {
      await b.listen(FAST);
      await b.trust.addPeer(b.peerOf(a, { tlsKey: a.identity.hostKey.publicKey }));
      assert.equal((await closed(tls())).length, 0);
      await until('it is in the log', () => b.audited.length > 0);
      assert.deepEqual(refusals(), ['peer-connect refused unknown-peer']);
    });

    it('without a certificate', async () => {
      await meet();
      const { cert: _cert, key: _key, ...none } = tlsOptions(a.identity.tls);
      await isRefused(kept(connectTls({ ...none, port: b.port, rejectUnauthorized: false })), 'unknown-peer');
    });

    it('of TLS 1.2', async () => {
      await meet();
      await isRefused(
        tls({ minVersion: 'TLSv1.2', maxVersion: 'TLSv1.2', sigalgs: undefined }),
        'bad-request',
      );
    });

    it('of another protocol over TLS', async () => {
      await meet();
      await isRefused(tls({ ALPNProtocols: ['http/1.1'] }), 'bad-request');
    });

    it('of no protocol over TLS', async () => {
      await meet();
      const { ALPNProtocols: _, ...none } = tlsOptions(a.identity.tls);
      await isRefused(kept(connectTls({ ...none, port: b.port, rejectUnauthorized: false })), 'unknown-peer');
    });

    it('of plain text', async () => {
      await meet();
      const socket = kept(connect(b.port, '127.0.0.1'));
      socket.write('PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n');
      // The alert of TLS comes, and nothing else.
      const came = await closed(socket);
      assert.ok(came.length === 0 || came[0] === 0x15, came.toString('hex'));
      await until('it is in the log', () => b.audited.length > 0);
      assert.deepEqual(refusals(), ['peer-connect refused bad-request']);
    });

    it('that begins no handshake in its time', async () => {
      await meet({ handshakeMs: 50 });
      const socket = kept(connect(b.port, '127.0.0.1'));
      await isRefused(socket, 'bad-request');
    });

    it('that stops in the middle of a handshake', async () => {
      await meet({ handshakeMs: 50 });
      const socket = kept(connect(b.port, '127.0.0.1'));
      // A record of a ClientHello that does not come to its end.
      socket.write(Buffer.from('1603010200010001fc0303', 'hex'));
      await isRefused(socket, 'bad-request');
    });
  });

  it('resumes no session of TLS: each connection proves its key anew', async () => {
    await meet();
    const sessions: Buffer[] = [];
    const first = tls();
    first.on('session', (session: Buffer) => sessions.push(session));
    await once(first, 'data');
    await until('the session may be kept', () => sessions.length > 0);
    const [session] = sessions;
    assert.ok(session);
    assert.equal((await admitted({ session })).isSessionReused(), false);
  });

  it('takes no more handshakes at once of one address than it may have, and goes on when they are over', async () => {
    await meet({ handshakesPerAddress: 3 });
    const silent = Array.from({ length: 3 }, () => kept(connect(b.port, '127.0.0.1')));
    await Promise.all(silent.map((socket) => once(socket, 'connect')));
    await closed(kept(connect(b.port, '127.0.0.1')));
    await assert.rejects(a.dial(a.trust.peerNamed('b')), refused('peer-unreachable'));
    for (const socket of silent) socket.destroy();
    await until('there is room again', async () =>
      a.dial(a.trust.peerNamed('b')).then(
        (channel) => {
          channel.close();
          return true;
        },
        () => false,
      ),
    );
    // However many came, the log has one entry of each kind for a minute.
    assert.ok(new Set(refusals()).size === refusals().length, refusals().join());
  });

  it('takes no more connections of one peer than it may have; another peer has room', async () => {
    await meet({ connectionsPerPeer: 2 });
    const c = await PeerHost.create('c');
    await b.add(c);
    await admitted();
    await admitted();
    await assert.rejects(a.dial(a.trust.peerNamed('b')), (error) => {
      assert.match((error as Error).message, /too many connections/);
      return refused('peer-closed')(error);
    });
    (await c.dial(await c.add(b))).close();
    assert.deepEqual(refusals(), ['peer-connect refused rate-limited']);
  });

  it('takes no more connections of one peer in a time than it may begin', async () => {
    await meet({ rate: { burst: 2, perSecond: 0.001 } });
    await admitted();
    await admitted();
    assert.equal((await closed(tls())).length, 0);
  });

  it('closes a connection of a peer that has no session', async () => {
    await meet({ idleMs: 100, silenceMs: 600_000 });
    await closed(await admitted());
  });

  it('closes a connection from which nothing comes, also where its session is open', async () => {
    const peer = await meet({ silenceMs: 100, idleMs: 60_000 });
    const session = b.nextSession();
    const channel = await a.dial(peer, { pingMs: 60_000 });
    assert.equal((await (await session).closed).code, 'rate-limited');
    assert.equal((await channel.closed).code, 'peer-closed');
  });

  it('keeps a connection whose peer asks now and then whether it is there', async () => {
    const peer = await meet({ silenceMs: 500 });
    const session = b.nextSession();
    const channel = await a.dial(peer, { pingMs: 50 });
    const server = await session;
    // Longer than the silence that is suffered.
    await assert.rejects(server.receive(1_000), refused('peer-late'));
    await channel.send({ type: 'HELLO', payload: Buffer.from('x') });
    assert.equal((await server.receive(5_000)).type, 'HELLO');
    channel.close();
  });

  it('closes a connection that brings more bytes than a migration has', async () => {
    const peer = await meet({ bytes: 100_000 });
    const session = b.nextSession();
    const channel = await a.dial(peer);
    const server = await session;
    await channel.send({ type: 'STATE', payload: Buffer.alloc(200_000) });
    assert.equal((await server.closed).code, 'rate-limited');
    await channel.closed;
  });

  it('hears nothing more of who has closed a line before its message had gone', async () => {
    const peer = await meet();
    const session = b.nextSession();
    const channel = await a.dial(peer);
    const server = await session;
    const message = { type: 'STATE', payload: Buffer.alloc(500_000) } as const;
    // Nobody reads there: after some of them there is no room.
    const sent = Array.from({ length: 6 }, () => channel.send(message).catch(() => undefined));
    await until('it reads no further', () => server.receivedBytes >= 1_000_000);
    channel.close();
    await Promise.all(sent);
    const received = async (): Promise<number> => {
      for (let count = 0; ; count++) {
        const next = await server.receive(10_000).catch(() => undefined);
        if (!next) return count;
      }
    };
    assert.ok((await received()) < 6);
  });

  it('ends a session in which a message is larger than any is, without keeping it', async () => {
    await meet();
    const http2 = caller();
    const stream = call(http2);
    const told = statusOf(stream);
    const head = Buffer.alloc(5);
    head.writeUInt32BE(8 * 1024 * 1024, 1);
    stream.write(head);
    assert.equal((await told)['grpc-status'], '8');
    http2.destroy();
  });

  it('ends a session in which something else comes than a message', async () => {
    await meet();
    const http2 = caller();
    const stream = call(http2);
    const told = statusOf(stream);
    stream.write(frameMessage(Buffer.from('ffffffff', 'hex')));
    assert.equal((await told)['vtpm-reason'], 'bad-request');
    http2.destroy();
  });

  it('has one call and one session for each connection', async () => {
    await meet();
    const http2 = caller();
    const status = async (path?: string) => (await statusOf(call(http2, path)))['grpc-status'];
    assert.equal(await status('/vtpm.v1.VtpmManager/Load'), '12');
    assert.equal(await status('/vtpm.v1.VtpmMigration/Migrate'), '12');
    const session = b.nextSession();
    const first = call(http2);
    await session;
    assert.equal(await status(), '14');
    assert.equal(b.sessions.length, 1);
    first.close();
    http2.destroy();
  });

  it('bears any bytes of a peer, and serves the next', async () => {
    const peer = await meet({ idleMs: 50 });
    const preface = Buffer.from('PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n');
    await fc.assert(
      fc.asyncProperty(fc.boolean(), fc.uint8Array({ maxLength: 300 }), async (isHttp2, bytes) => {
        const socket = await admitted();
        socket.end(isHttp2 ? Buffer.concat([preface, bytes]) : Buffer.from(bytes));
        await closed(socket);
      }),
      { numRuns: 20 },
    );
    const session = b.nextSession();
    const channel = await a.dial(peer);
    await channel.send({ type: 'HELLO', payload: Buffer.from('x') });
    assert.equal((await (await session).receive(10_000)).type, 'HELLO');
    channel.close();
  });

  it('cuts a peer that is removed, also where it has no session', async () => {
    await meet();
    const socket = await admitted();
    await b.trust.removePeer('a');
    await closed(socket);
  });

  it('listens on several addresses, IPv4 and IPv6', async () => {
    await b.listen({}, undefined, [
      { host: '127.0.0.1', port: 0 },
      { host: '::1', port: 0 },
    ]);
    await b.add(a);
    await a.add(b);
    for (const address of b.addresses) {
      const channel = await a.dial(a.peerOf(b, { addresses: [address] }));
      channel.close();
    }
    assert.match(b.addresses.join(), /^127\.0\.0\.1:\d+,\[::1\]:\d+$/);
  });
});

describe('who dials another host', () => {
  let a: PeerHost;
  let b: PeerHost;
  beforeEach(async () => {
    [a, b] = [await PeerHost.create('a'), await PeerHost.create('b')];
    await b.listen(FAST);
    await b.add(a);
  });
  afterEach(() => b.close());

  const why = (error: unknown): string => {
    refused('peer-unreachable')(error);
    return (error as Error).message;
  };

  it('takes the first address on which the key is proven, and says what became of each', async () => {
    const nobody = createServer();
    nobody.listen(0, '127.0.0.1');
    await once(nobody, 'listening');
    const { port } = nobody.address() as { port: number };
    nobody.close();
    const [good = ''] = b.addresses;
    const channel = await a.dial(a.peerOf(b, { addresses: [`127.0.0.1:${port}`, good] }));
    channel.close();
    await assert.rejects(
      a.dial(a.peerOf(b, { addresses: [`127.0.0.1:${port}`, 'no-such-host.invalid:1'] })),
      (error) => {
        assert.match(
          why(error),
          new RegExp(`127.0.0.1:${port}: nothing listens there.*no-such-host.invalid:1: `),
        );
        return true;
      },
    );
    await assert.rejects(a.dial(a.peerOf(b, { addresses: [] })), (error) =>
      /has no address/.test(why(error)),
    );
  });

  it('tells one that is there, and lets nobody in, from one that cannot be reached', async () => {
    const stranger = await PeerHost.create('c');
    const [address] = b.addresses;
    assert.ok(address);
    for (const addresses of [[address], [address, '127.0.0.1:1']]) {
      await assert.rejects(stranger.dial(stranger.peerOf(b, { addresses })), refused('peer-closed'));
    }
    const sockets: Socket[] = [];
    const silent = createTlsServer(
      { ...tlsOptions(b.identity.tls), requestCert: true, rejectUnauthorized: false },
      (socket) => sockets.push(socket),
    );
    silent.listen(0, '127.0.0.1');
    await once(silent, 'listening');
    const { port } = silent.address() as { port: number };
    const peer = a.peerOf(b, { addresses: [`127.0.0.1:${port}`] });
    await assert.rejects(a.dial(peer, { addressMs: 3_000 }), refused('peer-closed'));
    for (const socket of sockets) socket.destroy();
    silent.close();
  });

  it('sends nothing to a host that has another key than the one that is enrolled, and shows which', async () => {
    const mallory = tlsIdentity(randomBytes(32));
    let received = 0;
    const impostor = createTlsServer(
      { ...tlsOptions(mallory), requestCert: true, rejectUnauthorized: false },
      (socket) => {
        socket.on('error', () => undefined);
        socket.on('data', (chunk: Buffer) => {
          received += chunk.length;
        });
      },
    );
    impostor.listen(0, '127.0.0.1');
    await once(impostor, 'listening');
    const { port } = impostor.address() as { port: number };
    await assert.rejects(a.dial(a.peerOf(b, { addresses: [`127.0.0.1:${port}`] })), (error) => {
      assert.match(
        why(error),
        new RegExp(`another host answers: its TLS key is ${mallory.publicKey.toString('hex')}`),
      );
      return true;
    });
    impostor.close();
    assert.equal(received, 0);
  });

  it('takes no older TLS', async () => {
    const old = createTlsServer({
      ...tlsOptions(b.identity.tls),
      minVersion: 'TLSv1.2',
      maxVersion: 'TLSv1.2',
      requestCert: true,
      rejectUnauthorized: false,
    });
    old.on('tlsClientError', () => undefined);
    old.listen(0, '127.0.0.1');
    await once(old, 'listening');
    const { port } = old.address() as { port: number };
    await assert.rejects(a.dial(a.peerOf(b, { addresses: [`127.0.0.1:${port}`] })), (error) => {
      return /protocol/.test(why(error));
    });
    old.close();
  });

  it('gives up on a host that says nothing', async () => {
    const sockets: Socket[] = [];
    const silent = createServer((socket) => sockets.push(socket));
    silent.listen(0, '127.0.0.1');
    await once(silent, 'listening');
    const { port } = silent.address() as { port: number };
    const addresses = [`127.0.0.1:${port}`];
    await assert.rejects(a.dial(a.peerOf(b, { addresses }), { addressMs: 50 }), (error) => {
      return /no answer within 50 ms/.test(why(error));
    });
    for (const socket of sockets) socket.destroy();
    silent.close();
  });

  it('bears any bytes of the host that it knows', async () => {
    const sockets = new Set<Socket>();
    let said = Buffer.alloc(0);
    const hostile = createTlsServer(
      { ...tlsOptions(b.identity.tls), requestCert: true, rejectUnauthorized: false },
      (socket) => {
        sockets.add(socket);
        socket.on('error', () => undefined);
        socket.end(said);
      },
    );
    hostile.listen(0, '127.0.0.1');
    await once(hostile, 'listening');
    const { port } = hostile.address() as { port: number };
    const peer = a.peerOf(b, { addresses: [`127.0.0.1:${port}`] });
    await a.trust.addPeer(peer);
    // SETTINGS (RFC 9113 section 6.5): with it the dialling end believes that it is known.
    const settings = Buffer.from('000000040000000000', 'hex');
    await fc.assert(
      fc.asyncProperty(fc.boolean(), fc.uint8Array({ maxLength: 300 }), async (isHttp2, bytes) => {
        said = Buffer.concat([isHttp2 ? settings : Buffer.alloc(0), bytes]);
        try {
          const channel = await a.dial(peer);
          await assert.rejects(channel.receive(10_000), refused('peer-closed'));
        } catch (error) {
          refused('peer-closed')(error);
        }
      }),
      { numRuns: 20 },
    );
    for (const socket of sockets) socket.destroy();
    hostile.close();
  });

  it('is told where the other host does not know this one', async () => {
    await b.trust.removePeer('a');
    await assert.rejects(a.dial(a.peerOf(b)), (error) => {
      assert.match((error as Error).message, /does not know this host/);
      return refused('peer-closed')(error);
    });
  });

  it('finds out that the other host is gone without a word', async () => {
    // Between both: it holds everything back when it is told to.
    const halves: Socket[] = [];
    const between = createServer((near) => {
      const far = connect(b.port, '127.0.0.1');
      halves.push(near, far);
      for (const half of [near, far]) half.on('error', () => undefined);
      near.pipe(far);
      far.pipe(near);
    });
    between.listen(0, '127.0.0.1');
    await once(between, 'listening');
    const { port } = between.address() as { port: number };
    const peer = a.peerOf(b, { addresses: [`127.0.0.1:${port}`] });
    await a.trust.addPeer(peer);
    const channel = await a.dial(peer, { pingMs: 30 });
    for (const half of halves) {
      half.unpipe();
      half.pause();
    }
    assert.match((await channel.closed).message, /has not answered/);
    for (const half of halves) half.destroy();
    between.close();
  });
});
