import assert from 'node:assert/strict';
import { randomBytes, randomUUID } from 'node:crypto';
import type { PeerChannel } from 'vtpm-manager/peer/channel';
import { decode, encode, type MigrationHello, type PeerMessage, type StateBundle } from 'vtpm-proto';
import { HostileHost, pretended, ScriptedSource } from '../support/hostile-host.js';
import { MovingVtpm } from '../support/moving-vtpm.js';
import { TwoHosts } from '../support/two-hosts.js';

describe('I-3 I-5 I-10 a source whose root is hostile', () => {
  let hosts: TwoHosts;
  let hostile: HostileHost;
  /** Was at `b` and has gone back. */
  let visited: { id: string; vmUuid: string };

  before(async () => {
    hosts = await TwoHosts.create({ isLocal: true });
    const vtpm = await MovingVtpm.create(hosts, 'visited');
    await vtpm.move();
    await vtpm.move();
    await vtpm.destroy();
    const { body } = await hosts.a.installation.supervisord('GET', '/vtpms/visited');
    visited = { id: String(body.id), vmUuid: String(body.vmUuid) };
    hostile = await HostileHost.takeOver(hosts.a);
  });

  after(async () => {
    await hostile?.close();
    await hosts?.destroy();
  });

  afterEach('nothing of it has come', async () => {
    const { body } = await hosts.b.installation.admin('GET', '/vtpms');
    const kinds = (body.vtpms as { id: string; kind: string }[]).map(({ id, kind }) => [id, kind]);
    assert.deepEqual(kinds, [[visited.id, 'moved']]);
  });

  const sourceOf = async (
    changes: Partial<MigrationHello> = {},
    who: { id: string; vmUuid: string } = { id: randomUUID(), vmUuid: randomUUID() },
    wrap: (channel: PeerChannel) => PeerChannel = (channel) => channel,
  ): Promise<ScriptedSource> => {
    const channel = wrap(await hostile.dial(hosts.b));
    return new ScriptedSource(
      hostile,
      hosts.b,
      channel,
      pretended(`p${randomUUID()}`, who.id, who.vmUuid),
      changes,
    );
  };
  const prepared = async (): Promise<ScriptedSource> => {
    const source = await sourceOf();
    await source.prepare();
    return source;
  };
  const refused = (work: Promise<unknown>, code: string): Promise<void> =>
    assert.rejects(work, (error: { code?: string }) => {
      assert.equal(error.code, code, String(error));
      return true;
    });

  it('is heard to the end where it keeps to the protocol, without a dry run of which anything stays', async () => {
    const source = await sourceOf({ dryRun: true });
    await source.prepare();
    source.talk.channel.close();
  });

  describe('with a state that is not as it was announced', () => {
    const spoilt = (
      change: (bundle: StateBundle) => Partial<StateBundle>,
      source: ScriptedSource,
    ): Buffer => {
      const whole = source.bundle({}, { PERMANENT: randomBytes(5000), REFERENCE_KEY: randomBytes(32) });
      const bundle = decode('StateBundle', whole);
      return encode('StateBundle', { ...bundle, ...change(bundle) });
    };

    for (const [what, change] of [
      ['a part is missing', ({ parts }) => ({ parts: parts.slice(1) })],
      ['all parts are missing', () => ({ parts: [] })],
      ['its parts are in another order', ({ parts }) => ({ parts: [...parts].reverse() })],
      ['a part is there twice', ({ parts }) => ({ parts: [...parts, ...parts.slice(0, 1)] })],
      [
        'a part is cut',
        ({ parts }) => ({ parts: parts.map((part) => ({ ...part, sealed: part.sealed.subarray(0, -1) })) }),
      ],
      [
        'a bit of a part is another one',
        ({ parts }) => ({ parts: parts.map((part) => ({ ...part, sealed: flipped(part.sealed) })) }),
      ],
      [
        'a part has another kind',
        ({ parts }) => ({ parts: parts.map((part) => ({ ...part, kind: 'VOLATILE' })) }),
      ],
      ['its digest is another one', ({ completeness }) => ({ completeness: flipped(completeness) })],
    ] as const satisfies readonly (readonly [string, (bundle: StateBundle) => Partial<StateBundle>])[]) {
      it(`${what}: incomplete`, async () => {
        const source = await prepared();
        await refused(source.state(spoilt(change, source)), 'incomplete');
      });
    }

    it('it is of an earlier session: wrong-identifier', async () => {
      const before = await prepared();
      const replayed = before.bundle();
      before.talk.channel.close();
      const source = await prepared();
      await refused(source.state(replayed), 'wrong-identifier');
    });

    it('it is another VM’s: wrong-vm', async () => {
      const source = await prepared();
      await refused(source.state(source.bundle({ vmUuid: randomBytes(16) })), 'wrong-vm');
    });

    it('it is another vTPM’s: wrong-vm', async () => {
      const source = await prepared();
      await refused(source.state(source.bundle({ vtpmUuid: randomBytes(16) })), 'wrong-vm');
    });

    it('it is older: rollback-detected', async () => {
      const source = await prepared();
      await refused(source.state(source.bundle({ generation: 6n })), 'rollback-detected');
    });

    it('it is of another epoch: stale-epoch', async () => {
      const source = await prepared();
      await refused(source.state(source.bundle({ epoch: 4n })), 'stale-epoch');
    });

    it('a newer libtpms wrote it: incompatible', async () => {
      const source = await prepared();
      await refused(source.state(source.bundle({ libtpmsVersion: '99.0.0' })), 'incompatible');
    });
  });

  describe('with a beginning that is refused', () => {
    const begun = async (...args: Parameters<typeof sourceOf>): Promise<void> => {
      const source = await sourceOf(...args);
      await source.greet();
      await source.talk.receive('OFFER', 10_000);
    };

    it('a newer libtpms: incompatible', () => refused(begun({ libtpmsVersion: '99.0.0' }), 'incompatible'));

    it('another version of the protocol: incompatible', () =>
      refused(begun({ leastVersion: 2, mostVersion: 9 }), 'incompatible'));

    it('a newer format of records: incompatible', () => refused(begun({ recordFormat: 99 }), 'incompatible'));

    it('another host’s id: unknown-peer', () => refused(begun({ source: randomBytes(32) }), 'unknown-peer'));

    it('a state that is too large: too-large', () => refused(begun({ stateBytes: 1n << 40n }), 'too-large'));

    it('a vTPM that was here, of another VM: wrong-vm', () =>
      refused(
        begun({ epoch: 99n, generation: 99_999n }, { id: visited.id, vmUuid: randomUUID() }),
        'wrong-vm',
      ));

    it('a vTPM that was here, as it was before: rollback-detected', () =>
      refused(begun({ epoch: 1n, generation: 99_999n }, visited), 'rollback-detected'));

    it('a vTPM that was here, with fewer Saves: rollback-detected', () =>
      refused(begun({ epoch: 99n, generation: 1n }, visited), 'rollback-detected'));
  });

  it('with a whole session that was recorded: peer-unattested', async () => {
    const sent: PeerMessage[] = [];
    const source = await sourceOf({}, undefined, (channel) => recording(channel, sent));
    await source.prepare();
    source.talk.channel.close();
    const again = await hostile.dial(hosts.b);
    await replay(again, sent);
    await refused(answerTo(again), 'peer-unattested');
  });

  it('with a migration that there was already: migration-aborted', async () => {
    const before = await prepared();
    before.talk.channel.close();
    const { migrationId } = before.hello;
    const source = await sourceOf({ migrationId });
    await refused(source.prepare(), 'migration-aborted');
  });

  it('with the evidence of another session: peer-unattested', async () => {
    const sent: PeerMessage[] = [];
    const before = await sourceOf({}, undefined, (channel) => recording(channel, sent));
    await before.prepare();
    before.talk.channel.close();
    const source = await sourceOf();
    await source.greet();
    await source.talk.receive('OFFER', 10_000);
    await source.talk.receive('EVIDENCE', 10_000);
    await replay(
      source.talk.channel,
      sent.filter(({ type }) => type !== 'HELLO'),
    );
    await refused(source.talk.receive('READY', 10_000), 'peer-unattested');
  });
});

function flipped(bytes: Uint8Array): Buffer {
  const out = Buffer.from(bytes);
  out.writeUInt8(out.readUInt8(out.length >> 1) ^ 1, out.length >> 1);
  return out;
}

function recording(channel: PeerChannel, sent: PeerMessage[]): PeerChannel {
  return new Proxy(channel, {
    get(target, name) {
      if (name === 'send') {
        return (message: PeerMessage) => {
          sent.push(message);
          return target.send(message);
        };
      }
      const value = Reflect.get(target, name, target) as unknown;
      return typeof value === 'function' ? (value.bind(target) as unknown) : value;
    },
  });
}

async function replay(channel: PeerChannel, messages: readonly PeerMessage[]): Promise<void> {
  // Where it is refused before all of it is sent, that is what its answer says.
  for (const message of messages) await channel.send(message).catch(() => undefined);
}

/** @throws the refusal among what comes */
async function answerTo(channel: PeerChannel): Promise<void> {
  for (;;) {
    const { type, payload } = await channel.receive(10_000);
    if (type !== 'REFUSED') continue;
    const { reason, message } = decode('Refused', payload);
    throw Object.assign(new Error(message), { code: reason });
  }
}
