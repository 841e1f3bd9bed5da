import assert from 'node:assert/strict';
import crypto, { generateKeyPairSync, randomBytes } from 'node:crypto';
import { syncBuiltinESMExports } from 'node:module';
import {
  attestationKeyTemplate,
  ObjectAttribute,
  type Public,
  publicArea,
  signApproval,
} from 'tpm2-ts-bindings';
import { ManagerError, type ManagerErrorCode } from 'vtpm-manager/error';
import { OWN_RECORD_FORMAT } from 'vtpm-manager/migration/compatibility';
import type { Attestor } from 'vtpm-manager/migration/ports';
import type { SourceEnd } from 'vtpm-manager/migration/source';
import type { PeerChannel } from 'vtpm-manager/peer/channel';
import { sealSecret } from 'vtpm-manager/peer/import-key';
import { type ImportKey, requestApproval } from 'vtpm-manager/root-tpm/index';
import { boxKeyPair, decode, encode, type Messages, type Peer, type PeerMessage } from 'vtpm-proto';
import { LyingTpm } from '../manager/peer-fixture.js';
import { AttestingHost, PCRS } from '../support/attesting-host.js';

/**
 * What the ends of a migration show of themselves, over TLS and with TPMs, and what becomes of it where something is not
 * so. In each case the vTPM's worker is not even told to stop.
 */
describe('I-3 I-6 a migration between hosts that attest', () => {
  let source: AttestingHost;
  let destination: AttestingHost;

  before(async () => {
    [source, destination] = await Promise.all([
      AttestingHost.start('source'),
      AttestingHost.start('destination'),
    ]);
    await destination.listen();
  });
  after(async () => {
    await source?.close();
    await destination?.close();
  });
  let honest: Attestor;
  beforeEach(async () => {
    source.peers.list = [await destination.asPeer()];
    destination.peers.list = [await source.asPeer()];
    honest = destination.attestor;
    source.done.length = 0;
    destination.done.length = 0;
    destination.ends.length = 0;
  });
  afterEach(() => {
    destination.attestor = honest;
  });

  const migrate = async (): Promise<SourceEnd> => {
    const end = await source.migrateTo(destination.identity.hostKey.publicKey);
    await destination.settled();
    return end;
  };
  /** @param there what the destination calls it; the same unless given */
  const refused = async (
    code: ManagerErrorCode,
    text: RegExp,
    there: ManagerErrorCode = code,
  ): Promise<void> => {
    const end = await migrate();
    assert.ok('reason' in end, end.at);
    assert.deepEqual([end.at, end.reason.code], ['aborted', code], end.reason.message);
    assert.match(end.reason.message, text);
    assert.deepEqual(source.done, []);
    assert.ok(!destination.done.includes('arrivals.commit'));
    for (const one of destination.ends) {
      assert.ok('reason' in one);
      assert.equal(one.reason.code, there, one.reason.message);
    }
  };
  /** As far as it goes where nothing is wrong. */
  const freezes = async (why: string): Promise<void> => {
    await migrate();
    assert.equal(source.done[0], 'departures.suspend', why);
    for (const list of [source.done, destination.done, destination.ends]) list.length = 0;
  };
  const hello = (): Messages['MigrationHello'] => ({
    leastVersion: 1,
    mostVersion: 1,
    migrationId: randomBytes(16),
    nonce: randomBytes(32),
    sessionKey: boxKeyPair().publicKey,
    source: source.identity.hostKey.publicKey,
    destination: destination.identity.hostKey.publicKey,
    vtpmUuid: randomBytes(16),
    vmUuid: randomBytes(16),
    vmRunId: randomBytes(16),
    epoch: 1n,
    generation: 1n,
    mode: 'LIVE',
    recordFormat: OWN_RECORD_FORMAT,
    libtpmsVersion: '0.9.2',
    stateBytes: 1000n,
    description: Buffer.from('{}'),
    dryRun: false,
  });
  /** @param run gives the public key @returns where in memory the secret key is that was made for it meanwhile */
  const secretKeyOf = async (run: () => Promise<Uint8Array>): Promise<Uint8Array | undefined> => {
    const made: { readonly bytes: Uint8Array; readonly was: Buffer }[] = [];
    const { randomFillSync } = crypto;
    crypto.randomFillSync = ((bytes: Uint8Array) => {
      randomFillSync(bytes);
      made.push({ bytes, was: Buffer.from(bytes) });
      return bytes;
    }) as typeof randomFillSync;
    syncBuiltinESMExports();
    try {
      const publicKey = await run();
      return made.find(
        ({ was }) => was.length === 32 && Buffer.compare(boxKeyPair(was).publicKey, publicKey) === 0,
      )?.bytes;
    } finally {
      crypto.randomFillSync = randomFillSync;
      syncBuiltinESMExports();
    }
  };
  const changed = (host: AttestingHost, change: (peer: Peer) => Partial<Peer>): void => {
    host.peers.list = host.peers.list.map((peer) => ({ ...peer, ...change(peer) }));
  };

  it('gets as far as the freeze where all of it is true, and both remember the proof', async () => {
    const end = await migrate();
    assert.ok('reason' in end && end.reason.code === 'shutting-down', JSON.stringify(end));
    assert.equal(source.done[0], 'departures.suspend');
    assert.deepEqual(destination.done, ['arrivals.expect']);
    for (const { peers } of [source, destination]) assert.ok(peers.list[0]!.provenAt > 0n);
  });

  it('checks all of it without stopping anything: a dry run', async () => {
    const end = await source.migrateTo(destination.identity.hostKey.publicKey, true);
    assert.equal(end.at, 'checked');
    assert.deepEqual([...source.done, ...destination.done], []);
  });

  it('that the destination breaks off leaves nothing of the session in memory', async () => {
    const { exchange } = destination;
    const key = await secretKeyOf(async () => {
      let greeting: PeerMessage | undefined;
      destination.exchange = async (channel) => {
        greeting = await channel.receive(60_000);
        channel.close();
      };
      const end = await migrate();
      destination.exchange = exchange;
      assert.equal(end.at, 'aborted');
      return decode('MigrationHello', greeting!.payload).sessionKey;
    });
    assert.deepEqual(key, new Uint8Array(32));
  });

  it('is told that the other end failed, and not how', async () => {
    const makeImportKey = () => Promise.reject(new Error('/dev/chip7 burns'));
    destination.attestor = { ...bound(honest), makeImportKey };
    await refused('migration-refused', /: it failed \(internal\), and its log says why/, 'internal');
    const [end] = destination.ends;
    assert.match(end && 'reason' in end ? end.reason.message : '', /chip7 burns/);
  });

  describe('to a host that is not what it was enrolled as', () => {
    it('whose TLS key is another one: peer-unreachable, and nothing is said to it', async () => {
      changed(source, () => ({ tlsKey: randomBytes(32) }));
      await refused('peer-unreachable', /another host answers: its TLS key is/);
      assert.deepEqual(destination.ends, []);
    });

    it('that does not know the source: peer-closed', async () => {
      changed(destination, () => ({ tlsKey: randomBytes(32) }));
      await refused('peer-closed', /closes the connection/);
      assert.deepEqual(destination.ends, []);
    });

    it('with another endorsement key, which its TPM cannot answer for: peer-ek', async () => {
      const { publicArea } = await source.root.endorsement();
      changed(source, () => ({ endorsementKey: publicArea }));
      await refused('peer-ek', /not for the endorsement and attestation key/);
    });

    it('that guesses what the challenge was: peer-ak', async () => {
      destination.attestor = { ...bound(honest), answer: async () => randomBytes(32) };
      await refused('peer-ak', /did not answer the challenge/);
    });

    it('with an attestation key that is in no TPM: peer-ak, and only the challenge shows it', async () => {
      const liar = await liarAs(destination);
      destination.attestor = { ...bound(honest), ...liar.attestor, answer: async () => randomBytes(32) };
      changed(source, () => ({ attestationKey: liar.tpm.attestationKey.bytes }));
      await refused('peer-ak', /did not answer the challenge/);
      changed(source, () => ({ provenAt: 1n }));
      await freezes('all else is as it has to be');
    });

    it('with an attestation key that others can sign with: peer-ak', async () => {
      const { value } = attestationKeyTemplate();
      const objectAttributes = value.objectAttributes & ~ObjectAttribute.restricted;
      const key = publicArea({ ...value, objectAttributes } as Public);
      changed(source, () => ({ attestationKey: key.bytes, provenAt: 1n }));
      await refused('peer-ak', /not of the one kind that is taken/);
    });

    it('with another attestation key than the enrolled one: peer-unattested', async () => {
      const liar = await liarAs(destination);
      destination.attestor = { ...bound(honest), ...liar.attestor };
      changed(source, () => ({ provenAt: 1n }));
      await refused('peer-unattested', /the signature does not verify/);
    });

    it('with a platform that nobody approved: peer-platform', async () => {
      await destination.extend(7);
      await refused('peer-platform', /another one is.*vtpmctl peer approve destination/);
    });

    it('with an approval that was revoked: approval-stale', async () => {
      const { enrolment } = destination;
      const { pcrs, counter } = await destination.root.readPlatformState(enrolment);
      const facts = { label: 'firmware 1', pcrSelection: PCRS, pcrs, counter, createdAt: new Date() };
      const approval = signApproval(requestApproval(enrolment, facts), AUTHORITY.privateKey);
      destination.approvals = () => [approval];
      const policy = { kind: 'authority', authority: AUTHORITY.publicKey } as const;
      destination.enrolment = { ...enrolment, root: { ...enrolment.root, policy } };
      changed(source, () => ({ platforms: [], policyAuthority: AUTHORITY.publicKey }));
      await freezes('before that it is one');
      await destination.root.incrementRevocationCounter(enrolment);
      await refused('approval-stale', /"firmware 1".*was revoked/);
      destination.enrolment = enrolment;
    });

    it('with a key for the secret that it could use again: peer-import-key', async () => {
      const liar = await liarAs(destination);
      const again = (over: Uint8Array) =>
        liar.key(over, (key) => ({
          ...key,
          objectAttributes: key.objectAttributes | ObjectAttribute.userWithAuth,
        }));
      destination.attestor = { ...bound(honest), ...liar.attestor, makeImportKey: again };
      changed(source, () => ({ attestationKey: liar.tpm.attestationKey.bytes, provenAt: 1n }));
      await refused('peer-import-key', /not as it has to be/);
    });
  });

  describe('to a host that changes under way', () => {
    const keyThat = (happens: () => Promise<void>): Attestor => ({
      ...bound(honest),
      makeImportKey: async (over) => {
        const key = await honest.makeImportKey(over);
        const { publicArea, pcrSelection, certifyInfo, certifySignature } = key;
        const unwrap = async (point: Uint8Array): Promise<Buffer> => {
          await happens();
          return await key.unwrap(point);
        };
        const drop = () => key.drop();
        return { publicArea, pcrSelection, certifyInfo, certifySignature, unwrap, drop };
      },
    });

    it('by a restart between its key and its quote: peer-restarted', async () => {
      // What it measured before is not there afterwards.
      await destination.resetChip();
      source.peers.list = [await destination.asPeer()];
      destination.attestor = {
        ...bound(honest),
        evidence: async (over) => {
          await destination.resetChip();
          return await honest.evidence(over);
        },
      };
      await refused('peer-restarted', /was started again/);
    });

    it('by a restart after it was attested: import-key-lost', async () => {
      destination.attestor = keyThat(() => destination.resetChip());
      await refused('import-key-lost', /was reset since it was made/);
    });

    it('by another platform after it was attested: what was sent does not open there', async () => {
      destination.attestor = keyThat(() => destination.extend(7));
      await refused(
        'migration-refused',
        /the platform changed while a vTPM was on its way/,
        'platform-policy',
      );
    });
  });

  describe('from a host that is not what it was enrolled as', () => {
    let sourceAttestor: Attestor;
    beforeEach(() => {
      sourceAttestor = source.attestor;
    });
    afterEach('the destination holds no place for it', () => {
      source.attestor = sourceAttestor;
      assert.deepEqual(destination.done, []);
    });

    it('with a platform that nobody approved at the source: peer-platform', async () => {
      await source.extend(7);
      await refused('peer-platform', /another one is.*vtpmctl peer approve source/);
    });

    it('with another endorsement key: peer-ek', async () => {
      const { publicArea } = await destination.root.endorsement();
      changed(destination, () => ({ endorsementKey: publicArea }));
      await refused('peer-ek', /not for the endorsement and attestation key/);
    });

    it('with an attestation key in software: peer-ak', async () => {
      const liar = await liarAs(source);
      source.attestor = { ...bound(sourceAttestor), ...liar.attestor, answer: async () => randomBytes(32) };
      changed(destination, () => ({ attestationKey: liar.tpm.attestationKey.bytes }));
      await refused('peer-ak', /did not answer the challenge/);
    });

    it('that breaks off: nothing of the session stays in memory', async () => {
      const answers: Buffer[] = [];
      const challenge = (peer: Peer) => {
        const challenged = honest.challenge(peer);
        if (challenged) answers.push(challenged.answer);
        return challenged;
      };
      destination.attestor = { ...bound(honest), challenge };
      const channel = await source.dial(source.peers.list[0]!);
      const key = await secretKeyOf(async () => {
        await channel.send({ type: 'HELLO', payload: encode('MigrationHello', hello()) });
        const { type, payload } = await channel.receive(60_000);
        assert.equal(type, 'OFFER');
        return decode('MigrationOffer', payload).sessionKey;
      });
      channel.close();
      await destination.settled();
      assert.equal(destination.ends[0]?.at, 'ended');
      assert.deepEqual([key, answers.length], [new Uint8Array(32), 1]);
      assert.deepEqual(answers[0], Buffer.alloc(32));
    });

    it('with the quote of another session: peer-unattested', async () => {
      const before = await sourceAttestor.evidence(randomBytes(32));
      source.attestor = { ...bound(sourceAttestor), evidence: async () => before };
      await refused('peer-unattested', /made for another nonce/);
    });
  });

  describe('through a host in between', () => {
    let between: AttestingHost;
    /** What it does to a message. */
    let change: (message: PeerMessage) => PeerMessage = (message) => message;
    /** With whose keys it goes on to the destination. */
    let goesAs: AttestingHost;

    before(async () => {
      between = await AttestingHost.start('between');
      between.exchange = async (channel) => {
        const on = await between.dial(between.peers.named('destination'), goesAs.identity);
        await Promise.all([
          pump(channel, on, (message) => change(message)),
          pump(on, channel, (message) => change(message)),
        ]);
      };
    });
    after(() => between?.close());
    beforeEach(async () => {
      goesAs = source;
      between.peers.list = [await destination.asPeer(), await source.asPeer()];
      destination.peers.list = [await source.asPeer(), await between.asPeer()];
    });
    afterEach(() => {
      change = (message) => message;
    });
    const led = async (identity: AttestingHost): Promise<void> => {
      await between.listen(identity.identity);
      const { addresses } = await between.asPeer();
      changed(source, () => ({ addresses }));
    };
    const inMessage = <K extends keyof Messages>(
      type: PeerMessage['type'],
      name: K,
      edit: (value: Messages[K]) => Partial<Messages[K]>,
    ): void => {
      change = (message) => {
        if (message.type !== type) return message;
        const value = decode(name, message.payload);
        return { type, payload: encode(name, { ...value, ...edit(value) }) };
      };
    };

    it('that is a peer of both: peer-unreachable', async () => {
      await led(between);
      await refused('peer-unreachable', /another host answers/);
    });

    describe('that has the TLS key of the destination', () => {
      before(() => led(destination));
      beforeEach(async () => {
        const { addresses } = await between.asPeer();
        changed(source, () => ({ addresses }));
        goesAs = between;
      });

      it('and goes on with its own: unknown-peer, or peer-unattested', async () => {
        await refused('unknown-peer', /gives itself out as another host/);
        destination.ends.length = 0;
        inMessage('HELLO', 'MigrationHello', () => ({ source: between.identity.hostKey.publicKey }));
        const end = await migrate();
        assert.ok('reason' in end && end.reason.code === 'peer-unattested', JSON.stringify(end));
        assert.deepEqual([...source.done, ...destination.done], []);
      });

      it('and that the destination takes for the source: peer-unattested', async () => {
        const { tlsKey } = await between.asPeer();
        changed(destination, ({ name }) => (name === 'source' ? { tlsKey } : { tlsKey: randomBytes(32) }));
        const end = await migrate();
        assert.ok('reason' in end && end.reason.code === 'peer-unattested', JSON.stringify(end));
        assert.match(end.reason.message, /made for another nonce/);
        assert.deepEqual([...source.done, ...destination.done], []);
      });

      describe('and that of the source', () => {
        beforeEach(() => {
          goesAs = source;
        });

        it('can hand on what it cannot read', async () => {
          await freezes('it gets both ends there');
        });

        for (const [what, edit] of [
          [
            "the source's session key",
            () => inMessage('HELLO', 'MigrationHello', () => ({ sessionKey: own() })),
          ],
          ['the nonce', () => inMessage('HELLO', 'MigrationHello', () => ({ nonce: randomBytes(32) }))],
          [
            'which vTPM it is',
            () => inMessage('HELLO', 'MigrationHello', () => ({ vtpmUuid: randomBytes(16) })),
          ],
          [
            "the destination's session key",
            () => inMessage('OFFER', 'MigrationOffer', () => ({ sessionKey: own() })),
          ],
          [
            'the identifier',
            () => inMessage('OFFER', 'MigrationOffer', () => ({ identifier: randomBytes(32) })),
          ],
        ] as const) {
          it(`cannot change ${what}: peer-unattested`, async () => {
            edit();
            const end = await migrate();
            assert.ok('reason' in end && end.reason.code === 'peer-unattested', JSON.stringify(end));
            assert.deepEqual([...source.done, ...destination.done], []);
          });
        }

        it('cannot put a key of its own TPM in place of the import key', async () => {
          const { enrolment } = between;
          const key = await between.peers.ensureAttestationKey(() =>
            between.root.makeAttestationKey(enrolment),
          );
          const mine = await between.root.makeImportKey(enrolment, key, PCRS, randomBytes(32));
          inMessage('OFFER', 'MigrationOffer', () => ({ importKey: mine }));
          const end = await migrate();
          assert.ok('reason' in end && end.reason.code === 'peer-unattested', JSON.stringify(end));
          assert.deepEqual([...source.done, ...destination.done], []);
        });

        it('cannot put a secret of its own in place of the one that is wrapped: peer-import-key', async () => {
          let key: Uint8Array | undefined;
          change = ({ type, payload }) => {
            if (type === 'OFFER') key = decode('MigrationOffer', payload).importKey?.publicArea;
            if (type !== 'SECRET') return { type, payload };
            return { type, payload: encode('MigrationSecret', { point: sealSecret(key!).point }) };
          };
          const end = await migrate();
          assert.ok('reason' in end && end.reason.code === 'peer-import-key', JSON.stringify(end));
          assert.deepEqual(source.done, []);
        });

        it('cannot speak for a destination that has not unwrapped: peer-import-key', async () => {
          inMessage('READY', 'MigrationReady', () => ({ proof: randomBytes(32) }));
          const end = await migrate();
          assert.ok('reason' in end && end.reason.code === 'peer-import-key', JSON.stringify(end));
          assert.deepEqual(source.done, []);
        });
      });
    });
  });
});

const AUTHORITY = (() => {
  const { publicKey, privateKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' });
  return {
    publicKey: publicKey.export({ type: 'spki', format: 'pem' }) as string,
    privateKey: privateKey.export({ type: 'pkcs8', format: 'pem' }) as string,
  };
})();

const own = (): Uint8Array => boxKeyPair().publicKey;

/** Its calls, for others to be put beside them. */
function bound(attestor: Attestor): Attestor {
  return {
    makeImportKey: (over) => attestor.makeImportKey(over),
    evidence: (over) => attestor.evidence(over),
    answer: (challenge) => attestor.answer(challenge),
    challenge: (peer) => attestor.challenge(peer),
    prove: (peer, made, answer) => attestor.prove(peer, made, answer),
    verify: (peer, evidence, over) => attestor.verify(peer, evidence, over),
    wrap: (peer, offer, over, facts) => attestor.wrap(peer, offer, over, facts),
  };
}

/** Shows the approved platform of a host with keys in software, which say that they are a TPM's. */
async function liarAs(host: AttestingHost) {
  const tpm = new LyingTpm();
  const { pcrs } = await host.root.readPlatformState(host.enrolment);
  tpm.values.splice(0, 2, ...Object.values(pcrs).map((value) => Buffer.from(value, 'hex')));
  const key = async (over: Uint8Array, change?: (key: Public) => Public): Promise<ImportKey> => ({
    ...tpm.importKey(Buffer.from(over), change),
    unwrap: async (point) => tpm.unwrap(Buffer.from(point)),
    drop: async () => undefined,
  });
  const attestor: Pick<Attestor, 'makeImportKey' | 'evidence'> = {
    makeImportKey: (over) => key(over),
    evidence: async (over) => tpm.evidence(Buffer.from(over)),
  };
  return { tpm, key, attestor };
}

/** Until one of them ends; then the other one does, with what it was ended for. */
async function pump(
  from: PeerChannel,
  to: PeerChannel,
  change: (message: PeerMessage) => PeerMessage,
): Promise<void> {
  try {
    for (;;) await to.send(change(await from.receive(30_000)));
  } catch (error) {
    to.close(ManagerError.from(error));
  }
}
