import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { signDecision } from 'vtpm-manager/ownership/decisions';
import type { PeerChannel } from 'vtpm-manager/peer/channel';
import { type SignedDecision, signingKeyFromSeed } from 'vtpm-proto';
import { peakMiB } from '../bench/process-figures.js';
import { HostileHost, ScriptedDestination } from '../support/hostile-host.js';
import { migrate, type ToldProgress } from '../support/migrate.js';
import { MovingVtpm } from '../support/moving-vtpm.js';
import { TwoHosts } from '../support/two-hosts.js';

const NAME = 'web1';
/** Of a flood. */
const MESSAGES = 100_000;
/** What a manager may take more of, with a flood in front of it. */
const MOST_MIB = 64;

describe('I-3 I-8 I-10 a destination whose root is hostile', () => {
  let hosts: TwoHosts;
  let hostile: HostileHost;
  let vtpm: MovingVtpm;
  let stopListening: (() => Promise<void>) | undefined;

  before(async () => {
    hosts = await TwoHosts.create({ isLocal: true });
    vtpm = await MovingVtpm.create(hosts, NAME);
    hostile = await HostileHost.takeOver(hosts.b);
  });

  after(async () => {
    await stopListening?.();
    await vtpm?.destroy();
    await hostile?.close();
    await hosts?.destroy();
  });

  /** @returns how it ends at the source, whose guest works all the time and finds nothing wrong */
  const endAgainst = async (
    play: (destination: ScriptedDestination, channel: PeerChannel) => Promise<unknown>,
    onProgress: (progress: ToldProgress) => void = () => {},
  ): Promise<ToldProgress> => {
    await stopListening?.();
    stopListening = await hostile.listen(async (channel) => {
      const destination = new ScriptedDestination(hostile, channel, await channel.receive(30_000));
      const isInquiry = destination.first.type === 'INQUIRE';
      // What it plays ends with the session, however that ends.
      await (isInquiry ? destination.answerInquiry('ABORT') : play(destination, channel)).catch(
        () => undefined,
      );
    });
    vtpm.load();
    const lines = await migrate(hosts.a, hosts.b, NAME, { onProgress });
    await vtpm.moreRounds();
    await vtpm.pause();
    await vtpm.check();
    return lines.at(-1) as ToldProgress;
  };
  const assertRefused = ({ phase, reason }: ToldProgress, code: string): void =>
    assert.deepEqual([phase, reason], ['ABORTED', code]);

  it('that has an older libtpms: incompatible', async () => {
    const end = await endAgainst(async (destination) => {
      await destination.greeted();
      await destination.offer({ libtpmsVersion: '0.8.0' });
      await destination.talk.channel.closed;
    });
    assertRefused(end, 'incompatible');
  });

  it('that knows older records only: incompatible', async () => {
    const end = await endAgainst(async (destination) => {
      await destination.greeted();
      await destination.offer({ recordFormat: 0 });
      await destination.talk.channel.closed;
    });
    assertRefused(end, 'incompatible');
  });

  it('that has not unwrapped the secret: peer-import-key', async () => {
    const end = await endAgainst(async (destination) => {
      await destination.greeted();
      await destination.ready(() => randomBytes(32));
      await destination.talk.channel.closed;
    });
    assertRefused(end, 'peer-import-key');
  });

  it('that offers the import key of another session: peer-unattested', async () => {
    const end = await endAgainst(async (destination) => {
      await destination.greeted();
      const { publicArea, certifyInfo, certifySignature, pcrSelection } =
        await hostile.attestor.makeImportKey(randomBytes(32));
      await destination.offer({ importKey: { publicArea, certifyInfo, certifySignature, pcrSelection } });
      await destination.talk.channel.closed;
    });
    assertRefused(end, 'peer-unattested');
  });

  it('that says nothing: the guest is served, and the operator cancels', async () => {
    let cancelled: Promise<unknown> | undefined;
    const end = await endAgainst(
      async (_, channel) => {
        await channel.closed;
      },
      ({ phase }) => {
        if (phase === 'ATTESTING') {
          cancelled ??= vtpm
            .moreRounds()
            .then(() => hosts.a.installation.supervisord('DELETE', `/vtpms/${NAME}/migrate`));
        }
      },
    );
    assert.ok(cancelled);
    assertRefused(end, 'migration-aborted');
  });

  it('that floods: no more of it is read than was asked for', async () => {
    const before = peakMiB(hosts.a.installation.manager?.pid ?? 0);
    const end = await endAgainst(async (destination, channel) => {
      await destination.greeted();
      const payload = randomBytes(60_000);
      for (let message = 0; message < MESSAGES; message++) await channel.send({ type: 'OFFER', payload });
    });
    assertRefused(end, 'bad-request');
    const grown = peakMiB(hosts.a.installation.manager?.pid ?? 0) - before;
    assert.ok(grown < MOST_MIB, `the manager took ${grown.toFixed(0)} MiB more`);
  });

  it('that breaks off with everything prepared: the guest has not stopped', async () => {
    const end = await endAgainst(async (destination, channel) => {
      await destination.greeted();
      await destination.offer();
      channel.close();
    });
    assert.equal(end.phase, 'ABORTED');
    assert.equal(end.downtimeUs, 0);
  });

  const other = signingKeyFromSeed(randomBytes(32));
  for (const [what, lie] of [
    ['in another host’s name', (facts) => signDecision(other, facts)],
    [
      'of another migration',
      (facts) => signDecision(hostile.keys.hostKey, { ...facts, migrationId: randomBytes(16) }),
    ],
    [
      'of another vTPM',
      (facts) => signDecision(hostile.keys.hostKey, { ...facts, vtpmUuid: randomBytes(16) }),
    ],
    [
      'of an epoch before',
      (facts) => signDecision(hostile.keys.hostKey, { ...facts, epoch: facts.epoch - 1n }),
    ],
  ] as const satisfies readonly (readonly [string, (facts: DecisionFacts) => SignedDecision])[]) {
    it(`that lies about what it decided, ${what}: it is not heard, and the vTPM goes on after the ABORT`, async () => {
      const end = await endAgainst(async (destination) => {
        await destination.greeted();
        await destination.ready();
        const { migrationId, vtpmUuid, epoch, generation } = await destination.stateHeader();
        const source = destination.talk.peer.hostId;
        const facts = { migrationId, vtpmUuid, epoch, generation, source, verdict: 'COMMIT' as const };
        await destination.talk.send(
          'DECISION',
          lie({ ...facts, destination: hostile.keys.hostKey.publicKey }),
        );
        await destination.talk.channel.closed;
      });
      assert.equal(end.phase, 'ABORTED');
    });
  }

  it('lets an honest one through afterwards', async () => {
    await stopListening?.();
    stopListening = undefined;
    await hostile.close();
    await hosts.b.start();
    vtpm.load();
    await vtpm.move();
    await vtpm.pause();
  });
});

type DecisionFacts = Parameters<typeof signDecision>[1];
