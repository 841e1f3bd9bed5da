import assert from 'node:assert/strict';
import { createHash, generateKeyPairSync, randomBytes } from 'node:crypto';
import {
  ObjectAttribute as A,
  ActivateCredential,
  Alg,
  attestationKeyTemplate,
  ContextLoad,
  ContextSave,
  CreateLoaded,
  Duplicate,
  flush,
  Import,
  inSession,
  Load,
  LoadExternal,
  MakeCredential,
  makeCredential,
  ObjectChangeAuth,
  type ObjectEntity,
  objectEntity,
  type PolicyStep,
  type PublicArea,
  permanent,
  policyDigest,
  publicArea,
  ReadClock,
  Rh,
  rsaSrkTemplate,
  runPolicy,
  signInSoftware,
  softwareKeyPublic,
  softwareKeySensitive,
  softwareSealed,
  srkTemplate,
  type Tpm,
  Unseal,
  unnamed,
  unwrapDuplicate,
  VerifySignature,
  type Wrapped,
  withPassword,
  withSession,
  wrapForImport,
} from 'tpm2-ts-bindings';
import { type Swtpm, startSwtpm } from '../support/swtpm.js';
import { assertNothingLeaked, connectTpm, NOTHING, withPrimary } from '../support/tpm-fixture.js';
import { create, has, OWNER, says, withChild } from './make.js';

const PARENTS = [
  ['ECC P-256', srkTemplate()],
  ['RSA 2048', rsaSrkTemplate()],
] as const;

function flip(bytes: Buffer, at = bytes.length - 1): Buffer {
  const out = Buffer.from(bytes);
  out[at] = (out[at] ?? 0) ^ 1;
  return out;
}

describe('tpm2-ts-bindings: objects between TPMs and software', () => {
  let swtpm: Swtpm;
  let other: Swtpm;
  let tpm: Tpm;
  let otherTpm: Tpm;
  before(async () => {
    swtpm = await startSwtpm();
    other = await startSwtpm();
    tpm = await connectTpm(swtpm.socket);
    otherTpm = await connectTpm(other.socket);
  });
  after(async () => {
    await assertNothingLeaked(tpm);
    await assertNothingLeaked(otherTpm);
    await tpm.close();
    await otherTpm.close();
    await swtpm.stop();
    await other.stop();
  });

  async function withExternal<T>(area: PublicArea, body: (key: ObjectEntity) => Promise<T>): Promise<T> {
    const { objectHandle, name } = await tpm.run(
      LoadExternal,
      {},
      { inPrivate: undefined, inPublic: area, hierarchy: Rh.OWNER },
    );
    try {
      const key = objectEntity(objectHandle, area);
      assert.deepEqual(key.name, name);
      return await body(key);
    } finally {
      await flush(tpm, objectHandle);
    }
  }

  it('LoadExternal: public keys, whole keys in the null hierarchy, and no others', async () => {
    for (const pair of [
      generateKeyPairSync('ec', { namedCurve: 'P-256' }),
      generateKeyPairSync('ec', { namedCurve: 'P-384' }),
      generateKeyPairSync('rsa', { modulusLength: 2048 }),
    ]) {
      const area = softwareKeyPublic(pair.publicKey, { use: 'sign' });
      const message = randomBytes(50);
      const digest = createHash('sha256').update(message).digest();
      const signature = signInSoftware(pair.privateKey, message);
      await withExternal(area, async (keyHandle) => {
        await tpm.run(VerifySignature, { keyHandle }, { digest, signature });
        await assert.rejects(
          tpm.run(VerifySignature, { keyHandle }, { digest: flip(digest), signature }),
          says('SIGNATURE'),
        );
      });
      const inPrivate = softwareKeySensitive(pair.privateKey);
      const loaded = await tpm.run(LoadExternal, {}, { inPrivate, inPublic: area, hierarchy: Rh.NULL });
      await flush(tpm, loaded.objectHandle);
      await assert.rejects(
        tpm.run(LoadExternal, {}, { inPrivate, inPublic: area, hierarchy: Rh.OWNER }),
        says('HIERARCHY'),
      );
      const wrong = { ...inPrivate, sensitive: flip(inPrivate.sensitive) };
      await assert.rejects(
        tpm.run(LoadExternal, {}, { inPrivate: wrong, inPublic: area, hierarchy: Rh.NULL }),
        says('BINDING', 'KEY_SIZE'),
      );
    }
  });

  for (const [kind, template] of PARENTS) {
    it(`credentials for ${kind}: made in software or in the TPM, activated in the TPM`, async () => {
      const credential = randomBytes(32);
      await withPrimary(tpm, template, (keyHandle) =>
        withPrimary(tpm, attestationKeyTemplate(), async (ak) => {
          const activate = (blob: { credentialBlob: Buffer; secret: Buffer }, object: ObjectEntity = ak) =>
            tpm.run(
              ActivateCredential,
              { activateHandle: withPassword(object), keyHandle: withPassword(keyHandle) },
              { credentialBlob: blob.credentialBlob, secret: blob.secret },
            );
          const inSoftware = makeCredential(keyHandle.publicArea.value, ak.name, credential);
          assert.deepEqual((await activate(inSoftware)).certInfo, credential);
          const onTpm = await tpm.run(
            MakeCredential,
            { handle: keyHandle },
            { credential, objectName: ak.name },
          );
          assert.deepEqual((await activate(onTpm)).certInfo, credential);
          assert.equal(inSoftware.credentialBlob.length, onTpm.credentialBlob.length);

          const integrity = says('INTEGRITY', 'VALUE', 'SIZE');
          await assert.rejects(
            activate({ ...inSoftware, credentialBlob: flip(inSoftware.credentialBlob) }),
            integrity,
          );
          await assert.rejects(activate(inSoftware, keyHandle), says('INTEGRITY', 'TYPE'), 'another object');
          await assert.rejects(
            activate(makeCredential(keyHandle.publicArea.value, flip(ak.name), credential)),
            integrity,
          );
          await assert.rejects(
            tpm.run(
              MakeCredential,
              { handle: keyHandle },
              { credential: randomBytes(65), objectName: ak.name },
            ),
            says('SIZE'),
          );
          await assert.rejects(
            tpm.run(MakeCredential, { handle: ak }, { credential, objectName: ak.name }),
            says('TYPE'),
          );
        }),
      );
      assert.throws(
        () => makeCredential(attestationKeyTemplate().value, randomBytes(34), credential),
        has('usage'),
      );
    });

    for (const inner of [undefined, 128, 256] as const) {
      it(`Import under ${kind} of what software wrapped, inner wrapper ${inner ?? 'none'}`, async () => {
        const data = randomBytes(48);
        const authValue = Buffer.from('00aa00bb', 'hex');
        const { objectPublic, sensitive } = softwareSealed(data, { authValue });
        await withPrimary(tpm, template, async (parent) => {
          const wrap = () =>
            wrapForImport(
              parent.publicArea.value,
              objectPublic,
              sensitive,
              inner === undefined ? {} : { inner },
            );
          const send = (wrapped: Wrapped) => tpm.run(Import, { parentHandle: withPassword(parent) }, wrapped);
          const wrapped = wrap();
          const { outPrivate } = await send(wrapped);
          await withChild(
            tpm,
            parent,
            { outPrivate, outPublic: objectPublic },
            async (item) => {
              const { outData } = await inSession(
                tpm,
                { kind: 'hmac', salt: parent, encrypt: 'out' },
                (session) => tpm.run(Unseal, { itemHandle: withSession(item, session) }, {}),
              );
              assert.deepEqual(outData, data);
            },
            authValue,
          );
          await assert.rejects(send({ ...wrapped, duplicate: flip(wrapped.duplicate) }), says('INTEGRITY'));
          await assert.rejects(
            send({ ...wrapped, objectPublic: softwareSealed(data).objectPublic }),
            says('INTEGRITY'),
            'another object',
          );
          if (inner !== undefined) {
            await assert.rejects(
              send({ ...wrapped, encryptionKey: flip(wrapped.encryptionKey) }),
              says('INTEGRITY', 'SIZE', 'INSUFFICIENT'),
            );
          }
        });
      });
    }
  }

  it('an imported signing key signs', async () => {
    const pair = generateKeyPairSync('ec', { namedCurve: 'P-384' });
    const area = softwareKeyPublic(pair.publicKey, { use: 'sign', nameAlg: Alg.SHA384 });
    await withPrimary(tpm, srkTemplate(), async (parent) => {
      const wrapped = wrapForImport(parent.publicArea.value, area, softwareKeySensitive(pair.privateKey));
      const { outPrivate } = await tpm.run(Import, { parentHandle: withPassword(parent) }, wrapped);
      await withChild(tpm, parent, { outPrivate, outPublic: area }, async (key) => {
        assert.equal(key.name.length, 50);
      });
    });
  });

  /** Data under `parent` that may go where `policy` lets it. */
  async function movable(
    parent: ObjectEntity,
    policy: readonly PolicyStep[],
    data: Buffer,
    attributes = 0,
  ): Promise<{ outPrivate: Buffer; outPublic: PublicArea }> {
    return create(
      tpm,
      parent,
      publicArea({
        type: Alg.KEYEDHASH,
        nameAlg: Alg.SHA256,
        objectAttributes: A.userWithAuth | A.noDA | attributes,
        authPolicy: policyDigest(policy),
        parameters: { scheme: { scheme: Alg.NULL } },
        unique: NOTHING,
      }),
      { data },
    );
  }

  async function duplicate(
    object: ObjectEntity,
    newParent: { handle: number; name: Buffer | undefined },
    steps: readonly PolicyStep[],
    inner: 128 | undefined = undefined,
  ): Promise<Wrapped> {
    const symmetricAlg =
      inner === undefined
        ? ({ algorithm: Alg.NULL } as const)
        : ({ algorithm: Alg.AES, keyBits: inner, mode: Alg.CFB } as const);
    return inSession(tpm, { kind: 'policy' }, async (session) => {
      await runPolicy(tpm, session, steps);
      const out = await tpm.run(
        Duplicate,
        {
          objectHandle: withSession(object, session),
          newParentHandle: { authValue: NOTHING, ...newParent },
        },
        { encryptionKeyIn: NOTHING, symmetricAlg },
      );
      return {
        encryptionKey: out.encryptionKeyOut,
        objectPublic: object.publicArea,
        duplicate: out.duplicate,
        inSymSeed: out.outSymSeed,
        symmetricAlg,
      };
    });
  }

  it('from one TPM to another, and only to the parent that PolicyDuplicationSelect names', async () => {
    const data = randomBytes(40);
    // The Name of the object depends on its policy, so a policy with that Name can only be approved later.
    const pair = generateKeyPairSync('ec', { namedCurve: 'P-256' });
    const signer = softwareKeyPublic(pair.publicKey, { use: 'sign' });
    const approved = (steps: readonly PolicyStep[]): PolicyStep[] => [
      {
        assert: 'authorize',
        signer,
        approved: { policy: steps, signature: signInSoftware(pair.privateKey, policyDigest(steps)) },
      },
    ];
    // The parent goes as soon as the object is loaded: three objects are all that fit.
    const object = await withPrimary(tpm, srkTemplate(), async (parent) => {
      const made = await movable(parent, [{ assert: 'authorize', signer }], data);
      const { objectHandle } = await tpm.run(
        Load,
        { parentHandle: withPassword(parent) },
        { inPrivate: made.outPrivate, inPublic: made.outPublic },
      );
      return objectEntity(objectHandle, made.outPublic);
    });
    try {
      for (const includeObject of [false, true]) {
        await withPrimary(otherTpm, rsaSrkTemplate(), async (target) => {
          const steps = approved([
            {
              assert: 'duplication-select',
              newParentName: target.name,
              includeObject,
              objectName: object.name,
            },
          ]);
          const wrapped = await withExternal(target.publicArea, (newParent) =>
            duplicate(object, newParent, steps),
          );
          const { outPrivate } = await otherTpm.run(Import, { parentHandle: withPassword(target) }, wrapped);
          await withChild(otherTpm, target, { outPrivate, outPublic: object.publicArea }, async (moved) => {
            assert.deepEqual(moved.name, object.name);
            const { outData } = await otherTpm.run(Unseal, { itemHandle: withPassword(moved) }, {});
            assert.deepEqual(outData, data);
          });
          await withPrimary(tpm, srkTemplate(), async (parent) => {
            await assert.rejects(duplicate(object, parent, steps), says('POLICY_FAIL'), 'to another parent');
            await assert.rejects(
              tpm.run(Import, { parentHandle: withPassword(parent) }, wrapped),
              says('VALUE', 'SIZE', 'ECC_POINT', 'INSUFFICIENT', 'CURVE'),
              'imported under another parent',
            );
          });
        });
      }
    } finally {
      await flush(tpm, object.handle);
    }
  });

  it('Duplicate to a key of software, which unwraps it', async () => {
    const policy: PolicyStep[] = [{ assert: 'command-code', code: Duplicate.code }];
    for (const pair of [
      generateKeyPairSync('ec', { namedCurve: 'P-256' }),
      generateKeyPairSync('ec', { namedCurve: 'P-384' }),
      generateKeyPairSync('rsa', { modulusLength: 2048 }),
    ]) {
      const data = randomBytes(64);
      const area = softwareKeyPublic(pair.publicKey, { use: 'storage' });
      const key = { key: area.value, privateKey: pair.privateKey };
      for (const inner of [undefined, 128] as const) {
        const wrapped = await withPrimary(tpm, srkTemplate(), async (parent) => {
          const made = await movable(parent, policy, data, inner === undefined ? 0 : A.encryptedDuplication);
          return withChild(tpm, parent, made, (object) =>
            withExternal(area, (newParent) => duplicate(object, newParent, policy, inner)),
          );
        });
        const sensitive = unwrapDuplicate(key, wrapped);
        assert.equal(sensitive.sensitiveType, Alg.KEYEDHASH);
        assert.deepEqual(sensitive.sensitive, data);
        assert.throws(
          () => unwrapDuplicate(key, { ...wrapped, duplicate: flip(wrapped.duplicate) }),
          has('malformed'),
        );
        assert.throws(
          () => unwrapDuplicate(key, { ...wrapped, objectPublic: softwareSealed(data).objectPublic }),
          has('malformed'),
        );
        if (inner !== undefined) {
          assert.throws(
            () => unwrapDuplicate(key, { ...wrapped, encryptionKey: flip(wrapped.encryptionKey) }),
            has('malformed'),
          );
        }
        // And back, from software into a TPM.
        await withPrimary(otherTpm, srkTemplate(), async (target) => {
          const again = wrapForImport(
            target.publicArea.value,
            wrapped.objectPublic,
            sensitive,
            inner === undefined ? {} : { inner },
          );
          const { outPrivate } = await otherTpm.run(Import, { parentHandle: withPassword(target) }, again);
          await withChild(otherTpm, target, { outPrivate, outPublic: wrapped.objectPublic }, async (item) => {
            const { outData } = await otherTpm.run(Unseal, { itemHandle: withPassword(item) }, {});
            assert.deepEqual(outData, data);
          });
        });
      }
    }
  });

  it('Duplicate to no parent leaves only the inner wrapper, and is refused without a policy', async () => {
    const policy: PolicyStep[] = [{ assert: 'command-code', code: Duplicate.code }];
    const data = randomBytes(30);
    await withPrimary(tpm, srkTemplate(), async (parent) => {
      const made = await movable(parent, policy, data);
      await withChild(tpm, parent, made, async (object) => {
        for (const inner of [undefined, 128] as const) {
          const wrapped = await duplicate(object, permanent(Rh.NULL), policy, inner);
          assert.deepEqual(unwrapDuplicate(undefined, wrapped).sensitive, data);
          if (inner !== undefined) {
            const changed = { ...wrapped, duplicate: flip(wrapped.duplicate) };
            assert.throws(() => unwrapDuplicate(undefined, changed), has('malformed'));
          }
        }
        await assert.rejects(
          tpm.run(
            Duplicate,
            { objectHandle: withPassword(object), newParentHandle: permanent(Rh.NULL) },
            { encryptionKeyIn: NOTHING, symmetricAlg: { algorithm: Alg.NULL } },
          ),
          says('AUTH_TYPE', 'AUTH_UNAVAILABLE'),
        );
      });
    });
  });

  it('ObjectChangeAuth: the new private part opens with the new authValue, the loaded one with the old', async () => {
    const data = randomBytes(16);
    const [auth, newAuth] = [randomBytes(16), Buffer.from('0100ff', 'hex')];
    await withPrimary(tpm, srkTemplate(), async (parent) => {
      const { objectPublic, sensitive } = softwareSealed(data, { authValue: auth });
      const { outPrivate } = await tpm.run(
        Import,
        { parentHandle: withPassword(parent) },
        wrapForImport(parent.publicArea.value, objectPublic, sensitive),
      );
      const open = async (item: ObjectEntity) =>
        inSession(tpm, { kind: 'hmac' }, async (session) => {
          const { outData } = await tpm.run(Unseal, { itemHandle: withSession(item, session) }, {});
          assert.deepEqual(outData, data);
        });
      const changed = await withChild(
        tpm,
        parent,
        { outPrivate, outPublic: objectPublic },
        (item) =>
          inSession(tpm, { kind: 'hmac', salt: parent, encrypt: 'both' }, async (session) => {
            const out = await tpm.run(
              ObjectChangeAuth,
              { objectHandle: withSession(item, session), parentHandle: parent },
              { newAuth },
            );
            await open(item);
            await assert.rejects(
              tpm.run(
                ObjectChangeAuth,
                {
                  objectHandle: withSession(objectEntity(item.handle, objectPublic, newAuth), session),
                  parentHandle: parent,
                },
                { newAuth },
              ),
              says('BAD_AUTH', 'AUTH_FAIL'),
            );
            return out;
          }),
        auth,
      );
      await withChild(tpm, parent, { ...changed, outPublic: objectPublic }, open, newAuth);
    });
  });

  it('CreateLoaded: children and primary objects at once', async () => {
    const data = randomBytes(16);
    const template = publicArea({
      type: Alg.KEYEDHASH,
      nameAlg: Alg.SHA256,
      objectAttributes: A.userWithAuth | A.noDA | A.fixedTPM | A.fixedParent,
      authPolicy: NOTHING,
      parameters: { scheme: { scheme: Alg.NULL } },
      unique: NOTHING,
    });
    const make = (
      parent: { handle: number; name: Buffer | undefined; authValue: Uint8Array },
      inPublic: PublicArea,
      content: Buffer,
    ) =>
      tpm.run(
        CreateLoaded,
        { parentHandle: withPassword(parent) },
        { inSensitive: { userAuth: NOTHING, data: content }, inPublic },
      );
    const made = await make(OWNER, srkTemplate(), NOTHING);
    const primary = objectEntity(made.objectHandle, made.outPublic);
    try {
      assert.deepEqual(primary.name, made.name);
      assert.equal(made.outPrivate.length, 0);
      const child = await make(primary, template, data);
      const { outData } = await tpm.run(
        Unseal,
        { itemHandle: withPassword(objectEntity(child.objectHandle, child.outPublic)) },
        {},
      );
      assert.deepEqual(outData, data);
      await flush(tpm, child.objectHandle);
      await assert.rejects(
        make(primary, { ...template, bytes: flip(template.bytes, 0) }, data),
        says('TYPE', 'VALUE'),
      );
    } finally {
      await flush(tpm, made.objectHandle);
    }
  });

  it('ContextSave and ContextLoad: objects and sessions come back, changed ones do not', async () => {
    const auth = randomBytes(8);
    await withPrimary(
      tpm,
      srkTemplate(),
      async (key) => {
        const { context } = await tpm.run(ContextSave, { saveHandle: key }, {});
        assert.equal(context.value.savedHandle, 0x80000000);
        assert.equal(context.value.hierarchy, Rh.OWNER);
        assert.equal(typeof context.value.sequence, 'bigint');
        const { loadedHandle } = await tpm.run(ContextLoad, {}, { context });
        assert.notEqual(loadedHandle, key.handle);
        const copy = objectEntity(loadedHandle, key.publicArea, auth);
        // The same key with the same authValue: it takes a salt.
        await inSession(tpm, { kind: 'hmac', salt: copy, bind: copy }, (session) =>
          tpm.run(ReadClock, {}, {}, [session]),
        );
        await flush(tpm, loadedHandle);
        await assert.rejects(
          tpm.run(ContextLoad, {}, { context: { ...context, bytes: flip(context.bytes) } }),
          says('INTEGRITY'),
        );
      },
      auth,
    );
    await assert.rejects(tpm.run(ContextSave, { saveHandle: unnamed(0x80000001) }, {}), says('REFERENCE_H0'));

    await inSession(tpm, { kind: 'hmac' }, async (session) => {
      const { context } = await tpm.run(ContextSave, { saveHandle: session }, {});
      await assert.rejects(tpm.run(ReadClock, {}, {}, [session]), says('REFERENCE_S0'));
      const { loadedHandle } = await tpm.run(ContextLoad, {}, { context });
      assert.equal(loadedHandle, session.handle);
      await tpm.run(ReadClock, {}, {}, [session]);
      // A session's context is good once.
      await assert.rejects(tpm.run(ContextLoad, {}, { context }), says('HANDLE'));
    });
  });
});
