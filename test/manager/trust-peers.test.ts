import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import type { KeyHierarchy } from 'vtpm-manager/keys/index';
import { createAnchoredStore, openAnchoredStore } from 'vtpm-manager/store/index';
import { MAX_PEERS } from 'vtpm-manager/trust/peers';
import {
  createTrustStore,
  openTrustStore,
  rekeyTrust,
  TRUST_KEY,
  type TrustStore,
} from 'vtpm-manager/trust/trust-configuration';
import { MemoryStore, storeFull } from '../support/memory-store.js';
import { anchorOptions, testKeys } from '../support/test-keys.js';
import { testPeer } from '../support/test-peer.js';
import { refused } from './ownership-fixture.js';

describe('peers in the trust configuration', () => {
  let keys: KeyHierarchy;
  let disk: MemoryStore;
  let trust: TrustStore;
  let anchor: ReturnType<typeof anchorOptions>;

  beforeEach(async () => {
    keys = testKeys();
    disk = new MemoryStore();
    anchor = anchorOptions(keys);
    const store = await createAnchoredStore(disk, anchor);
    await createTrustStore(keys, store, randomBytes(32), 1n);
    trust = await openTrustStore(keys, store);
  });

  const reopened = async () => openTrustStore(keys, await openAnchoredStore(disk, anchor));

  it('are found by name, TLS key and host id, also after a restart, until they are removed', async () => {
    const peer = testPeer();
    await trust.addPeer(peer);
    for (const store of [trust, await reopened()]) {
      for (const found of [
        store.peerNamed('b'),
        store.peerOf(peer.tlsKey),
        store.peerById(peer.hostId),
        store.peers()[0],
      ]) {
        assert.equal(found?.name, 'b');
        assert.deepEqual(Buffer.from(found.endorsementKey), peer.endorsementKey);
      }
      assert.equal(store.peerOf(peer.hostId), undefined);
    }
    await trust.removePeer('b');
    for (const store of [trust, await reopened()]) assert.deepEqual(store.peers(), []);
    await assert.rejects(trust.removePeer('b'), refused('unknown-peer'));
  });

  it('share no name, host id, TLS key or endorsement key, and none is this host', async () => {
    const peer = testPeer();
    await trust.addPeer(peer);
    for (const same of ['name', 'hostId', 'tlsKey', 'endorsementKey'] as const) {
      const other = testPeer({ name: 'c', [same]: peer[same] });
      await assert.rejects(trust.addPeer(other), refused('peer-exists'), same);
    }
    const self = testPeer({ name: 'c', hostId: keys.hostKey.publicKey });
    await assert.rejects(trust.addPeer(self), refused('bad-request'));
    await trust.addPeer(testPeer({ name: 'c' }));
    assert.equal(trust.peers().length, 2);
  });

  it('are refused where something of them is not as it should be', async () => {
    const odd = [
      { name: '' },
      { name: 'B' },
      { name: '-b' },
      { name: 'a'.repeat(64) },
      { hostId: randomBytes(31) },
      { tlsKey: randomBytes(33) },
      { backupKey: randomBytes(31) },
      { installation: randomBytes(15) },
      { endorsementKey: Buffer.alloc(0) },
      { attestationKey: Buffer.alloc(2000) },
      { endorsedBy: '' },
      { addresses: ['192.0.2.7'] },
      { addresses: ['192.0.2.7:1', '192.0.2.7:1'] },
      { addresses: Array.from({ length: 9 }, (_, i) => `192.0.2.7:${i + 1}`) },
      { platforms: [{ pcrSelection: 'sha256:7', pcrDigest: randomBytes(20), approvedAt: 1n }] },
      { policyAuthority: 'x'.repeat(2000) },
    ];
    for (const changes of odd) {
      await assert.rejects(trust.addPeer(testPeer(changes)), refused('bad-request'), Object.keys(changes)[0]);
    }
    assert.equal(trust.peers().length, 0);
  });

  it('are at most 256', async () => {
    for (let i = 0; i < MAX_PEERS; i++) await trust.addPeer(testPeer({ name: `p${i}` }));
    await assert.rejects(trust.addPeer(testPeer({ name: 'one-more' })), refused('bad-request'));
    assert.equal((await reopened()).peers().length, MAX_PEERS);
  });

  it('change in what is approved of them, never in who they are', async () => {
    const peer = testPeer();
    await trust.addPeer(peer);
    const changed = await trust.changePeer('b', (old) => ({
      ...old,
      name: 'other',
      hostId: randomBytes(32),
      tlsKey: randomBytes(32),
      backupKey: randomBytes(32),
      endorsementKey: randomBytes(90),
      attestationKey: randomBytes(90),
      provenAt: 7n,
      mayReceive: false,
      platforms: [],
    }));
    assert.deepEqual(changed, { ...peer, provenAt: 7n, mayReceive: false, platforms: [] });
    assert.equal((await reopened()).peerNamed('b')?.provenAt, 7n);
    await assert.rejects(
      trust.changePeer('c', (old) => old),
      refused('unknown-peer'),
    );
  });

  it('change only when the disk has it, and then who listens is told', async () => {
    let told = 0;
    trust.onPeersChanged(() => {
      told += 1;
    });
    disk.beforeCommit = storeFull;
    await assert.rejects(trust.addPeer(testPeer()), refused('store-full'));
    assert.equal(trust.peers().length, 0);
    assert.equal(told, 0);
    disk.beforeCommit = () => assert.equal(trust.peers().length, 0);
    await trust.addPeer(testPeer());
    assert.equal(told, 1);
    disk.beforeCommit = () => undefined;
    await trust.allowImage(randomBytes(32), undefined, 1n);
    assert.equal(told, 1);
  });

  it('make the attestation key once, whoever asks at the same time', async () => {
    let made = 0;
    const make = async () => {
      made += 1;
      return randomBytes(200);
    };
    assert.equal(trust.attestationKey(), undefined);
    const [one, other] = await Promise.all([
      trust.ensureAttestationKey(make),
      trust.ensureAttestationKey(make),
    ]);
    assert.equal(made, 1);
    assert.deepEqual(one, other);
    const after = await reopened();
    assert.deepEqual(await after.ensureAttestationKey(make), one);
    assert.equal(made, 1);
  });
});

describe('the trust configuration of a recovered installation', () => {
  it('has its peers, and the attestation key only where the TPM is the same', async () => {
    const keys = testKeys();
    const disk = new MemoryStore();
    const anchor = anchorOptions(keys);
    const store = await createAnchoredStore(disk, anchor);
    await createTrustStore(keys, store, randomBytes(32), 1n);
    const before = await openTrustStore(keys, store);
    await before.addPeer(testPeer());
    const key = await before.ensureAttestationKey(async () => randomBytes(200));
    for (const [isOtherTpm, kept] of [
      [false, key],
      [true, undefined],
    ] as const) {
      const entry = await store.read(TRUST_KEY);
      assert.ok(entry);
      await store.write(TRUST_KEY, entry.version, rekeyTrust(keys, entry.value, isOtherTpm), 'now');
      const after = await openTrustStore(keys, store);
      assert.deepEqual(after.attestationKey(), kept);
      assert.equal(after.peers().length, 1);
    }
  });
});

describe('the keys of a host for other hosts', () => {
  it('are of the installation, apart from each other', () => {
    const keys = testKeys();
    assert.equal(keys.hostKey.publicKey.length, 32);
    assert.notDeepEqual(keys.hostKey.publicKey, keys.backupKey.publicKey);
    assert.equal(keys.peerTlsSeed.length, 32);
    keys.wipe();
    assert.deepEqual(keys.peerTlsSeed, Buffer.alloc(32));
  });
});
