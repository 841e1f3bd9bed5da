import assert from 'node:assert/strict';
import { createHash, randomBytes } from 'node:crypto';
import fc from 'fast-check';
import { ManagerError } from 'vtpm-manager';
import { MAX_MESSAGE_BYTES, type PeerMessage } from 'vtpm-proto';
import { type PeerPair, peerPair } from '../support/peer-hosts.js';
import { refused } from './ownership-fixture.js';

const message = (payload: Uint8Array, type: PeerMessage['type'] = 'STATE'): PeerMessage => ({
  type,
  payload: Buffer.from(payload),
});
const DEADLINE_MS = 10_000;

describe('a channel between two hosts', () => {
  let pair: PeerPair;
  beforeEach(async () => {
    // The runs of one property share a connection.
    pair = await peerPair({ bytes: 64 * 1024 * 1024 });
  });
  afterEach(() => pair.close());

  it('has the peer and the same binding of both TLS keys at both ends', () => {
    const { a, b, client, server } = pair;
    assert.equal(client.peer.name, 'b');
    assert.equal(server.peer.name, 'a');
    const both = Buffer.concat([a.identity.tls.publicKey, b.identity.tls.publicKey]);
    const expected = createHash('sha256').update(both).digest();
    assert.deepEqual(client.binding, expected);
    assert.deepEqual(server.binding, expected);
  });

  it('brings every message whole and in order, both ways at once, however they are sized', async () => {
    const sizes = fc.oneof(fc.nat(64), fc.nat(100_000), fc.constant(MAX_MESSAGE_BYTES - 16));
    await fc.assert(
      fc.asyncProperty(
        fc.array(sizes, { maxLength: 6 }),
        fc.array(sizes, { maxLength: 6 }),
        async (up, down) => {
          const { client, server } = pair;
          const through = async (from: typeof client, to: typeof client, lengths: number[]) => {
            const sent = lengths.map((length) => message(randomBytes(length)));
            const sending = (async () => {
              for (const one of sent) await from.send(one);
            })();
            for (const one of sent) assert.deepEqual(await to.receive(DEADLINE_MS), one);
            await sending;
          };
          await Promise.all([through(client, server, up), through(server, client, down)]);
        },
      ),
      { numRuns: 20 },
    );
    assert.equal(pair.client.sentBytes, pair.server.receivedBytes);
    assert.equal(pair.server.sentBytes, pair.client.receivedBytes);
  });

  it('sends no message over the limit, and is of use after it', async () => {
    const { client, server } = pair;
    await assert.rejects(client.send(message(Buffer.alloc(MAX_MESSAGE_BYTES))), refused('too-large'));
    await client.send(message(Buffer.from('small')));
    assert.equal(Buffer.from((await server.receive(DEADLINE_MS)).payload).toString(), 'small');
  });

  it('says when nothing came in time, and is of use after it', async () => {
    const { client, server } = pair;
    await assert.rejects(server.receive(20), refused('peer-late'));
    await client.send(message(Buffer.from('late')));
    assert.equal(Buffer.from((await server.receive(DEADLINE_MS)).payload).toString(), 'late');
  });

  it('gives out what came before its end, then the reason', async () => {
    const { client, server } = pair;
    await server.send(message(Buffer.from('1')));
    await server.send(message(Buffer.from('2'), 'REFUSED'));
    server.close(new ManagerError('peer-platform', 'its platform is not approved'));
    assert.equal(Buffer.from((await client.receive(DEADLINE_MS)).payload).toString(), '1');
    assert.equal((await client.receive(DEADLINE_MS)).type, 'REFUSED');
    await assert.rejects(client.receive(DEADLINE_MS), (error) => {
      assert.match((error as Error).message, /peer-platform: its platform is not approved/);
      return refused('peer-closed')(error);
    });
    await assert.rejects(client.send(message(Buffer.from('3'))), refused('peer-closed'));
    assert.equal((await server.closed).code, 'peer-platform');
  });

  it('ends at the other end when the one that dialled closes it', async () => {
    const { client, server } = pair;
    const waiting = server.receive(DEADLINE_MS);
    client.close();
    await assert.rejects(waiting, refused('peer-closed'));
    assert.equal((await server.closed).code, 'peer-closed');
    await assert.rejects(client.receive(DEADLINE_MS), refused('peer-closed'));
  });

  it('reads two messages ahead and no more: the sender waits, and nothing is lost', async () => {
    const { client, server } = pair;
    let sent = 0;
    const sending = (async () => {
      for (let i = 0; i < 20; i++) {
        await client.send(message(Buffer.alloc(256 * 1024, i)));
        sent += 1;
      }
    })();
    // Until nothing more comes, in the time that fifty messages take to go there and back.
    for (let idle = 0, before = -1; idle < 50; idle++) {
      await server.send(message(Buffer.from('pace')));
      await client.receive(DEADLINE_MS);
      if (server.receivedBytes !== before) idle = 0;
      before = server.receivedBytes;
    }
    assert.ok(sent < 15, `${sent}`);
    for (let i = 0; i < 20; i++) {
      const { payload } = await server.receive(DEADLINE_MS);
      assert.equal(payload[0], i);
    }
    await sending;
  });

  it('cuts off a peer that is removed, at either end, at once', async () => {
    const { a, b, client, server } = pair;
    const waiting = server.receive(DEADLINE_MS);
    await b.trust.removePeer('a');
    await assert.rejects(waiting, refused('unknown-peer'));
    assert.throws(() => server.peer, refused('unknown-peer'));
    await client.closed;
    await b.add(a);
    const session = b.nextSession();
    const again = await a.dial(a.trust.peerNamed('b'));
    await session;
    await a.trust.removePeer('b');
    assert.equal((await again.closed).code, 'unknown-peer');
    await (await session).closed;
  });

  it('has the peer as it is enrolled now', async () => {
    const { b, server } = pair;
    await b.trust.changePeer('a', (peer) => ({ ...peer, provenAt: 5n }));
    assert.equal(server.peer.provenAt, 5n);
  });
});
