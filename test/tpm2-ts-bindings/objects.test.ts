import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { join } from 'node:path';
import {
  attestationKeyTemplate,
  ContextSave,
  createChild,
  createPrimary,
  createTpm,
  defineNvIndex,
  duplicateTo,
  Ht,
  importChild,
  inSession,
  listHandles,
  loadChild,
  loadPublic,
  NV_UndefineSpace,
  NvAttribute,
  openSocket,
  openTpm,
  type PolicyStep,
  permanent,
  policyDigest,
  publicArea,
  Rh,
  readNvIndex,
  readObject,
  runPolicy,
  sealedTemplate,
  srkTemplate,
  type Tpm,
  Unseal,
  whileLoaded,
  withPassword,
  withSession,
} from 'tpm2-ts-bindings';
import { startRecordingProxy } from '../support/recording-proxy.js';
import { type Swtpm, startSwtpm } from '../support/swtpm.js';
import { assertNothingLeaked, withPrimary } from '../support/tpm-fixture.js';
import { has, OWNER, says } from './make.js';

describe('tpm2-ts-bindings: objects from their making to their flush', () => {
  let swtpm: Swtpm;
  let tpm: Tpm;
  beforeEach(async () => {
    swtpm = await startSwtpm();
    tpm = await openTpm(swtpm.socket);
  });
  afterEach(async () => {
    await assertNothingLeaked(tpm);
    await tpm.close();
    await swtpm.stop();
  });

  it('openTpm: a socket, a device, and what is neither', async () => {
    await assert.rejects(openTpm(join(swtpm.directory, 'none')), /cannot be opened: there is no such device/);
    await assert.rejects(openTpm(swtpm.directory), has('transport'));
    const zero = await openTpm('/dev/zero');
    await assert.rejects(listHandles(zero, Ht.TRANSIENT), has('transport'));
    await zero.close();
  });

  it('createPrimary: the same key for the same template, another in another hierarchy', async () => {
    const nameOf = (hierarchy: number) =>
      whileLoaded(
        tpm,
        createPrimary(tpm, srkTemplate(), { hierarchy: withPassword(permanent(hierarchy)) }),
        async (key) => key.name.toString('hex'),
      );
    const owner = await nameOf(Rh.OWNER);
    assert.equal(
      await whileLoaded(tpm, createPrimary(tpm, srkTemplate()), async (key) => key.name.toString('hex')),
      owner,
    );
    assert.notEqual(await nameOf(Rh.ENDORSEMENT), owner);
  });

  it('listHandles: sessions of either kind, loaded or saved', async () => {
    await inSession(tpm, { kind: 'hmac' }, (hmac) =>
      inSession(tpm, { kind: 'policy' }, async (policy) => {
        const both = [hmac.handle, policy.handle].sort();
        assert.deepEqual((await listHandles(tpm, Ht.HMAC_SESSION)).sort(), both);
        await tpm.run(ContextSave, { saveHandle: policy }, {});
        assert.deepEqual(await listHandles(tpm, Ht.HMAC_SESSION), [hmac.handle]);
        const saved = await listHandles(tpm, Ht.POLICY_SESSION);
        assert.deepEqual(
          saved.map((handle) => handle & 0xff_ffff),
          [policy.handle & 0xff_ffff],
        );
      }),
    );
  });

  it('readObject: what is not loaded or not persistent is undefined', async () => {
    for (const handle of [0x80000000, 0x81000777]) assert.equal(await readObject(tpm, handle), undefined);
    await withPrimary(tpm, srkTemplate(), async (srk) => {
      assert.deepEqual((await readObject(tpm, srk.handle))?.name, srk.name);
    });
  });

  it('whileLoaded: flushes after an error too', async () => {
    const failing = whileLoaded(tpm, createPrimary(tpm, srkTemplate()), async (key) => {
      assert.deepEqual(await listHandles(tpm, Ht.TRANSIENT), [key.handle]);
      throw new Error('of the body');
    });
    await assert.rejects(failing, /of the body/);
    assert.deepEqual(await listHandles(tpm, Ht.TRANSIENT), []);
  });

  it('createChild and loadChild: what sessions encrypt is in no byte on the bus', async () => {
    const authValue = randomBytes(32);
    const data = randomBytes(128);
    const template = publicArea({ ...sealedTemplate(Buffer.alloc(0)).value, objectAttributes: 0x440 | 0x12 });
    await tpm.close();
    const bus = await startRecordingProxy(swtpm.socket);
    tpm = createTpm(await openSocket(bus.path));
    await whileLoaded(tpm, createPrimary(tpm, srkTemplate()), (srk) =>
      inSession(tpm, { kind: 'hmac', salt: srk, encrypt: 'both' }, async (session) => {
        const parent = withPassword(srk);
        const child = await createChild(tpm, parent, template, { authValue, data, sessions: [session] });
        await whileLoaded(
          tpm,
          loadChild(tpm, parent, child, { authValue, sessions: [session] }),
          async (item) => {
            const { outData } = await tpm.run(Unseal, { itemHandle: withSession(item, session) }, {});
            assert.deepEqual(outData, data);
          },
        );
        await assert.rejects(
          loadChild(tpm, parent, { ...child, outPublic: attestationKeyTemplate() }),
          says('INTEGRITY'),
        );
      }),
    );
    assert.equal(bus.saw(data) || bus.saw(authValue), false);
    await assertNothingLeaked(tpm);
    await bus.close();
    await tpm.close();
    tpm = await openTpm(swtpm.socket);
  });

  it('duplicateTo and importChild: with the policy only, and only under the parent', async () => {
    const policy: PolicyStep[] = [{ assert: 'command-code', code: 0x14b }];
    const template = publicArea({
      ...attestationKeyTemplate().value,
      objectAttributes: 0x40060,
      authPolicy: policyDigest(policy),
    });
    const other = await startSwtpm();
    const target = await openTpm(other.socket);
    try {
      await whileLoaded(target, createPrimary(target, srkTemplate()), async (newParent) => {
        const parcel = await whileLoaded(tpm, createPrimary(tpm, srkTemplate()), async (srk) => {
          const child = await createChild(tpm, withPassword(srk), template);
          return whileLoaded(tpm, loadChild(tpm, withPassword(srk), child), (key) =>
            inSession(tpm, { kind: 'policy' }, async (session) => {
              const send = () => duplicateTo(tpm, key, session, newParent.publicArea);
              await assert.rejects(send(), says('POLICY_FAIL'));
              await runPolicy(tpm, session, policy);
              return send();
            }),
          );
        });
        const child = await importChild(target, withPassword(newParent), parcel);
        await whileLoaded(target, loadChild(target, withPassword(newParent), child), async (key) => {
          assert.deepEqual(key.publicArea.bytes, parcel.objectPublic.bytes);
        });
        await whileLoaded(tpm, createPrimary(tpm, srkTemplate()), async (srk) => {
          await assert.rejects(importChild(tpm, withPassword(srk), parcel), says('INTEGRITY', 'ECC_POINT'));
        });
      });
      await assertNothingLeaked(target);
    } finally {
      await target.close();
      await other.stop();
    }
  });

  it('loadPublic and defineNvIndex: the Names are those of the TPM', async () => {
    const srk = await whileLoaded(tpm, createPrimary(tpm, srkTemplate()), async (key) => key);
    await whileLoaded(tpm, loadPublic(tpm, srk.publicArea), async (key) =>
      assert.deepEqual(key.name, srk.name),
    );
    const attributes = NvAttribute.AUTHREAD | NvAttribute.AUTHWRITE;
    const index = await defineNvIndex(tpm, withPassword(OWNER), {
      nvIndex: 0x01800001,
      attributes,
      dataSize: 3,
    });
    assert.deepEqual(index.name, (await readNvIndex(tpm, 0x01800001))?.name);
    await tpm.run(NV_UndefineSpace, { authHandle: withPassword(OWNER), nvIndex: index }, {});
  });
});
