import assert from 'node:assert/strict';
import { createHash, randomBytes } from 'node:crypto';
import {
  Alg,
  attestationKeyTemplate,
  Cap,
  Create,
  EvictControl,
  embed,
  flush,
  GetCapability,
  Ht,
  inSession,
  Load,
  listHandles,
  NvAttribute as N,
  NV_DefineSpace,
  NV_Increment,
  NV_Read,
  NV_UndefineSpace,
  NV_Write,
  nvEntity,
  type ObjectEntity,
  objectEntity,
  PCR_Extend,
  PolicyGetDigest,
  type PolicyStep,
  Pt,
  parseAttest,
  parsePcrSelection,
  pcrDigest,
  permanent,
  policyDigest,
  publicArea,
  publicKeyObject,
  Quote,
  Rc,
  ReadClock,
  Rh,
  readNvIndex,
  readObject,
  readPcrs,
  readProperty,
  runPolicy,
  SelfTest,
  Shutdown,
  Sign,
  St,
  Startup,
  Su,
  srkTemplate,
  type Tpm,
  TpmError,
  tpmsNvPublic,
  Unseal,
  VerifySignature,
  verifyQuote,
  verifySignature,
  withPassword,
  withSession,
} from 'tpm2-ts-bindings';
import { type Swtpm, startSwtpm } from '../support/swtpm.js';
import { assertNothingLeaked, connectTpm, NOTHING, withPrimary } from '../support/tpm-fixture.js';

const OWNER = permanent(Rh.OWNER);

describe('tpm2-ts-bindings: commands', () => {
  let swtpm: Swtpm;
  let tpm: Tpm;
  before(async () => {
    swtpm = await startSwtpm({ flags: 'not-need-init' });
    tpm = await connectTpm(swtpm.socket);
  });
  after(async () => {
    await assertNothingLeaked(tpm);
    await tpm.run(Shutdown, {}, { shutdownType: Su.CLEAR });
    await tpm.close();
    await swtpm.stop();
  });

  it('a TPM that was not started says INITIALIZE until Startup', async () => {
    await assert.rejects(readProperty(tpm, Pt.MANUFACTURER), (error) => TpmError.is(error, Rc.INITIALIZE));
    await tpm.run(Startup, {}, { startupType: Su.CLEAR });
    assert.equal(await readProperty(tpm, Pt.MANUFACTURER), 0x49424d00);
    await tpm.run(SelfTest, {}, { fullTest: false });
  });

  it('capabilities of every group parse', async () => {
    for (const [capability, property] of [
      [Cap.ALGS, 0],
      [Cap.HANDLES, 0x40000000],
      [Cap.COMMANDS, 0x11f],
      [Cap.PCRS, 0],
      [Cap.TPM_PROPERTIES, 0x100],
      [Cap.ECC_CURVES, 0],
    ] as const) {
      const { capabilityData } = await tpm.run(
        GetCapability,
        {},
        { capability, property, propertyCount: 100 },
      );
      assert.equal(capabilityData.capability, capability);
    }
    assert.ok((await listHandles(tpm, Ht.PERMANENT)).includes(Rh.OWNER));
  });

  it('clocks are 64-bit', async () => {
    const { currentTime } = await tpm.run(ReadClock, {}, {});
    assert.equal(typeof currentTime.time, 'bigint');
    assert.ok(currentTime.clockInfo.clock >= 0n);
  });

  it('PCRs: extending folds, and more than eight are read', async () => {
    const event = randomBytes(32);
    const before = await readPcrs(tpm, parsePcrSelection('sha256:16'));
    await tpm.run(
      PCR_Extend,
      { pcrHandle: withPassword(permanent(16)) },
      { digests: [{ hashAlg: Alg.SHA256, digest: event }] },
    );
    const [value] = await readPcrs(tpm, parsePcrSelection('sha256:16'));
    const folded = createHash('sha256').update(before[0]!).update(event).digest();
    assert.deepEqual(value, folded);

    const many = await readPcrs(tpm, parsePcrSelection('sha256:0,1,2,3,4,5,6,7,8,9,16,23+sha384:7'));
    assert.deepEqual(
      many.map((pcr) => pcr.length),
      [...Array(12).fill(32), 48],
    );
    assert.deepEqual(many[10], folded);
  });

  it('a PCR selection is refused by name where it makes no sense', () => {
    for (const text of ['', 'sha256', 'sha256:', 'sha256:24', 'md5:1', 'sha256:1,,2', '7']) {
      assert.throws(() => parsePcrSelection(text), /is no PCR selection/, text);
    }
    assert.deepEqual(parsePcrSelection('sha256:7,0,7'), [{ hash: Alg.SHA256, pcrs: [0, 7] }]);
  });

  it('the offline policy digest is the one the TPM computes', async () => {
    const selection = parsePcrSelection('sha256:0,7,16');
    const digest = pcrDigest(Alg.SHA256, await readPcrs(tpm, selection));
    const pcr: PolicyStep = { assert: 'pcr', selection, digest };
    const code: PolicyStep = { assert: 'command-code', code: Unseal.code };
    const authValue: PolicyStep = { assert: 'auth-value' };
    const secret: PolicyStep = { assert: 'secret', of: withPassword(OWNER) };
    const withRef: PolicyStep = { ...secret, policyRef: Buffer.from('a reference') };
    for (const steps of [
      [],
      [pcr],
      [code],
      [authValue],
      [secret],
      [withRef],
      [pcr, code, authValue, secret],
    ]) {
      for (const kind of ['trial', 'policy'] as const) {
        await inSession(tpm, { kind }, async (session) => {
          await runPolicy(tpm, session, steps);
          const onTpm = await tpm.run(PolicyGetDigest, { policySession: session }, {});
          assert.deepEqual(
            policyDigest(steps),
            onTpm.policyDigest,
            JSON.stringify(steps.map((s) => s.assert)),
          );
        });
      }
    }
  });

  it('objects become persistent and go again', async () => {
    const handle = 0x81000042;
    assert.equal(await readObject(tpm, handle), undefined);
    await withPrimary(tpm, srkTemplate(), async (srk) => {
      const owner = withPassword(OWNER);
      await tpm.run(EvictControl, { auth: owner, objectHandle: srk }, { persistentHandle: handle });
      const kept = await readObject(tpm, handle);
      assert.deepEqual(kept?.name, srk.name);
      await tpm.run(EvictControl, { auth: owner, objectHandle: kept! }, { persistentHandle: handle });
      assert.equal(await readObject(tpm, handle), undefined);
    });
  });

  it('NV: a counter with an authValue counts in an HMAC session; its Name changes once', async () => {
    const auth = Buffer.from('00ff00aa00', 'hex');
    const index = nvEntity(
      embed(tpmsNvPublic, {
        nvIndex: 0x01810001,
        nameAlg: Alg.SHA256,
        attributes: N.AUTHWRITE | N.AUTHREAD | N.COUNTER | N.NO_DA,
        authPolicy: NOTHING,
        dataSize: 8,
      }),
      auth,
    );
    await inSession(tpm, { kind: 'hmac' }, async (session) => {
      const owner = withSession(OWNER, session);
      await tpm.run(NV_DefineSpace, { authHandle: owner }, { auth, publicInfo: index.nvPublic });
      assert.deepEqual((await readNvIndex(tpm, index.handle))?.name, index.name);
      await tpm.run(NV_Increment, { authHandle: withSession(index, session), nvIndex: index }, {});
      // WRITTEN is set now; the old Name no longer authorises.
      await assert.rejects(
        tpm.run(NV_Increment, { authHandle: withSession(index, session), nvIndex: index }, {}),
        (error) => TpmError.is(error, Rc.AUTH_FAIL, Rc.BAD_AUTH),
      );
      const written = (await readNvIndex(tpm, index.handle, auth))!;
      const read = async (): Promise<bigint> => {
        const authHandle = withSession(written, session);
        const { data } = await tpm.run(NV_Read, { authHandle, nvIndex: written }, { size: 8, offset: 0 });
        return data.readBigUInt64BE();
      };
      const first = await read();
      await tpm.run(NV_Increment, { authHandle: withSession(written, session), nvIndex: written }, {});
      assert.equal(await read(), first + 1n);
      await tpm.run(NV_UndefineSpace, { authHandle: owner, nvIndex: written }, {});
      assert.equal(await readNvIndex(tpm, index.handle), undefined);
    });
  });

  it('NV: what was written encrypted is read back', async () => {
    const content = randomBytes(64);
    const nvPublic = embed(tpmsNvPublic, {
      nvIndex: 0x01810002,
      nameAlg: Alg.SHA256,
      attributes: N.OWNERWRITE | N.OWNERREAD | N.NO_DA,
      authPolicy: NOTHING,
      dataSize: 64,
    });
    await withPrimary(tpm, srkTemplate(), (srk) =>
      inSession(tpm, { kind: 'hmac', encrypt: 'both', salt: srk }, async (session) => {
        const authHandle = withSession(OWNER, session);
        await tpm.run(NV_DefineSpace, { authHandle }, { auth: NOTHING, publicInfo: nvPublic });
        await tpm.run(NV_Write, { authHandle, nvIndex: nvEntity(nvPublic) }, { data: content, offset: 0 });
        const nvIndex = (await readNvIndex(tpm, 0x01810002))!;
        const { data } = await tpm.run(NV_Read, { authHandle, nvIndex }, { size: 64, offset: 0 });
        assert.deepEqual(data, content);
        await tpm.run(NV_UndefineSpace, { authHandle, nvIndex }, {});
      }),
    );
  });

  async function withAttestationKey(body: (key: ObjectEntity) => Promise<void>): Promise<void> {
    await withPrimary(tpm, srkTemplate(), async (srk) => {
      const parentHandle = withPassword(srk);
      const made = await tpm.run(
        Create,
        { parentHandle },
        {
          inSensitive: { userAuth: NOTHING, data: NOTHING },
          inPublic: attestationKeyTemplate(),
          outsideInfo: NOTHING,
          creationPCR: [],
        },
      );
      const loaded = await tpm.run(
        Load,
        { parentHandle },
        { inPrivate: made.outPrivate, inPublic: made.outPublic },
      );
      try {
        await body(objectEntity(loaded.objectHandle, made.outPublic));
      } finally {
        await flush(tpm, loaded.objectHandle);
      }
    });
  }

  it('a quote verifies with node:crypto, and nothing but that quote', async () => {
    const selection = parsePcrSelection('sha256:0,7,16');
    const values = await readPcrs(tpm, selection);
    const nonce = randomBytes(20);
    await withAttestationKey(async (ak) => {
      const { quoted, signature } = await tpm.run(
        Quote,
        { signHandle: withPassword(ak) },
        { qualifyingData: nonce, inScheme: { scheme: Alg.NULL }, pcrSelect: selection },
      );
      const key = ak.publicArea.value;
      const expected = { key, nonce, selection, values };
      const attest = verifyQuote(quoted, signature, expected);
      assert.equal(attest.type, St.ATTEST_QUOTE);
      assert.equal(typeof attest.firmwareVersion, 'bigint');
      assert.equal(publicKeyObject(key).asymmetricKeyType, 'ec');

      const refused = (text: RegExp, change: Partial<typeof expected>, bytes = quoted): void => {
        assert.throws(() => verifyQuote(bytes, signature, { ...expected, ...change }), text);
      };
      refused(/another nonce/, { nonce: randomBytes(20) });
      refused(/other registers/, { selection: parsePcrSelection('sha256:0,7') });
      refused(/other register values/, { values: [randomBytes(32), values[1]!, values[2]!] });
      refused(/does not verify/, {}, Buffer.concat([quoted.subarray(0, -1), Buffer.of(quoted.at(-1)! ^ 1)]));
      refused(/does not verify/, {
        key: await withPrimary(tpm, srkTemplate(), async (srk) => srk.publicArea.value),
      });
      assert.throws(
        () => parseAttest(Buffer.concat([Buffer.from('00544347', 'hex'), quoted.subarray(4)])),
        /not made/,
      );
    });
  });

  it('a signature verifies in node:crypto and in the TPM', async () => {
    const template = attestationKeyTemplate().value;
    assert.equal(template.type, Alg.ECC);
    const message = randomBytes(100);
    const digest = createHash('sha256').update(message).digest();
    // Not restricted: a restricted key signs outside digests only with a ticket.
    const unrestricted = { ...template, objectAttributes: template.objectAttributes & ~(1 << 16) };
    await withPrimary(tpm, publicArea(unrestricted), async (key) => {
      const { signature } = await tpm.run(
        Sign,
        { keyHandle: withPassword(key) },
        {
          digest,
          inScheme: { scheme: Alg.NULL },
          validation: { tag: St.HASHCHECK, hierarchy: Rh.NULL, digest: NOTHING },
        },
      );
      assert.equal(verifySignature(key.publicArea.value, message, signature), true);
      assert.equal(verifySignature(key.publicArea.value, randomBytes(100), signature), false);
      const { validation } = await tpm.run(VerifySignature, { keyHandle: key }, { digest, signature });
      assert.equal(validation.tag, St.VERIFIED);
      await assert.rejects(
        tpm.run(VerifySignature, { keyHandle: key }, { digest: randomBytes(32), signature }),
        (error) => TpmError.is(error, Rc.SIGNATURE),
      );
    });
  });
});
