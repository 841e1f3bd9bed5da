import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { createLogger } from 'vtpm-common';
import type { PeerChannel } from 'vtpm-manager/peer/channel';
import { answerRescues, type RescueBook, tellRescues } from 'vtpm-manager/rescue/exchange';
import { RescueMessenger } from 'vtpm-manager/rescue/messenger';
import { encode, type SignedRescue } from 'vtpm-proto';
import { PeerHost } from '../support/peer-hosts.js';

/** Notices whose bytes are the uuid alone: what is in one is nothing to an exchange. */
class TestBook implements RescueBook {
  readonly here: Uint8Array[] = [];
  readonly taken: string[] = [];
  readonly refused = new Set<string>();

  async held(): Promise<SignedRescue[]> {
    return this.here.map((notice) => ({ notice, signature: new Uint8Array(64) }));
  }

  async heard(_: Uint8Array, uuid: Uint8Array): Promise<void> {
    const at = this.here.findIndex((other) => Buffer.compare(other, uuid) === 0);
    if (at >= 0) this.here.splice(at, 1);
  }

  async take(_: Uint8Array, rescues: readonly SignedRescue[]): Promise<Uint8Array[]> {
    const heard = rescues.map(({ notice }) => notice).filter((uuid) => !this.refused.has(hex(uuid)));
    this.taken.push(...heard.map(hex));
    return heard;
  }
}

const hex = (bytes: Uint8Array) => Buffer.from(bytes).toString('hex');
const log = createLogger('test', { 'log-level': 'silent', 'log-format': 'json' });

describe('hosts that tell each other what they rescued', () => {
  let a: PeerHost;
  let b: PeerHost;
  let here: TestBook;
  let there: TestBook;
  const uuids = Array.from({ length: 3 }, () => randomBytes(16));

  const answer = async (channel: PeerChannel): Promise<void> =>
    await answerRescues(channel, await channel.receive(10_000), there);

  async function listen(): Promise<void> {
    await b.listen({}, answer);
    await b.add(a);
    await a.add(b);
  }

  const dial = () => a.dial(a.trust.peers()[0]);

  beforeEach(async () => {
    [a, b] = [await PeerHost.create('a'), await PeerHost.create('b')];
    [here, there] = [new TestBook(), new TestBook()];
  });
  afterEach(() => b.close());

  it('say it in both directions, and forget what was heard', async () => {
    here.here.push(uuids[0]!, uuids[1]!);
    there.here.push(uuids[2]!);
    await listen();
    const channel = await dial();
    assert.equal(await tellRescues(channel, here), true);
    await channel.closed;
    assert.deepEqual(there.taken, [hex(uuids[0]!), hex(uuids[1]!)]);
    assert.deepEqual(here.taken, [hex(uuids[2]!)]);
    assert.deepEqual([here.here, there.here], [[], []]);
  });

  it('keep what was not heard', async () => {
    here.here.push(uuids[0]!, uuids[1]!);
    there.refused.add(hex(uuids[1]!));
    await listen();
    const channel = await dial();
    assert.equal(await tellRescues(channel, here), false);
    channel.close();
    assert.deepEqual(here.here.map(hex), [hex(uuids[1]!)]);
  });

  it('refuse more at a time than there can be', async () => {
    let reason: Promise<unknown> | undefined;
    await b.listen({}, async (channel) => {
      reason = answer(channel).catch((error: unknown) => error);
      await reason;
    });
    await b.add(a);
    await a.add(b);
    const channel = await dial();
    const rescues = Array.from({ length: 257 }, () => ({ notice: uuids[0]!, signature: randomBytes(64) }));
    await channel.send({ type: 'RESCUED', payload: encode('Rescues', { rescues, heard: [] }) });
    await channel.closed;
    assert.match(String(await reason), /more than 256 rescues/);
    assert.deepEqual(there.taken, []);
  });

  describe('by messenger', () => {
    let messenger: RescueMessenger;
    const ended = new AbortController().signal;
    const start = (dialPeer: () => Promise<PeerChannel> = dial) => {
      messenger = new RescueMessenger({
        book: here,
        log,
        peers: () => a.trust.peers(),
        dial: dialPeer,
        backoffMs: [1, 4],
      });
    };
    afterEach(() => messenger.close());

    it('is in effect when the start has asked', async () => {
      there.here.push(uuids[0]!);
      await listen();
      start();
      await messenger.askAll(60_000, ended);
      assert.deepEqual(here.taken, [hex(uuids[0]!)]);
    });

    it('does not hold the start longer than its time, and asks again', async () => {
      there.here.push(uuids[0]!);
      await listen();
      let attempts = 0;
      let heard = (): void => undefined;
      const taken = new Promise<void>((resolve) => {
        heard = resolve;
      });
      const take = here.take.bind(here);
      here.take = async (host, rescues) => {
        const uuids = await take(host, rescues);
        heard();
        return uuids;
      };
      let answerLate = (): void => undefined;
      const late = new Promise<void>((resolve) => {
        answerLate = resolve;
      });
      start(async () => {
        attempts += 1;
        if (attempts > 1) return await dial();
        await late;
        throw new Error('no way to it');
      });
      await messenger.askAll(20, ended);
      assert.deepEqual(here.taken, []);
      answerLate();
      await taken;
      assert.deepEqual(here.taken, [hex(uuids[0]!)]);
    });

    it('asks nobody where the setting is 0', async () => {
      await listen();
      start(() => assert.fail('a peer was asked'));
      await messenger.askAll(0, ended);
    });

    it('tells again and again until it was heard', async () => {
      here.here.push(uuids[0]!);
      await listen();
      let attempts = 0;
      start(async () => {
        attempts += 1;
        if (attempts < 3) throw new Error('no way to it');
        return await dial();
      });
      const told = new Promise<void>((resolve) => {
        const note = here.heard.bind(here);
        here.heard = async (host, uuid) => {
          await note(host, uuid);
          resolve();
        };
      });
      await messenger.tellAll();
      await told;
      assert.equal(attempts, 3);
      assert.deepEqual(there.taken, [hex(uuids[0]!)]);
    });
  });
});
