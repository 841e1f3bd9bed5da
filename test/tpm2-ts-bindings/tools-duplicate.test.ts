import assert from 'node:assert/strict';
import { createHash, generateKeyPairSync, type KeyObject, randomBytes } from 'node:crypto';
import {
  ObjectAttribute as A,
  Alg,
  concat,
  Duplicate,
  Import,
  inSession,
  type ObjectEntity,
  type PolicyStep,
  type PublicArea,
  policyDigest,
  publicArea,
  Rh,
  rsaSrkTemplate,
  runPolicy,
  Sign,
  St,
  softwareKeyPublic,
  softwareSealed,
  srkTemplate,
  type Tpm,
  Unseal,
  unwrapDuplicate,
  verifySignature,
  type Wrapped,
  withPassword,
  withSession,
  wrapForImport,
} from 'tpm2-ts-bindings';
import { NOTHING, withPrimary } from '../support/tpm-fixture.js';
import { flip, type Tpm2Tools, withSuiteTools } from '../support/tpm2-tools.js';
import { privateFile, publicFile, seedFile } from '../support/tpm2-tools-files.js';
import { create, has, says, withChild } from './make.js';

const POLICY: PolicyStep[] = [{ assert: 'command-code', code: Duplicate.code }];
const AES_128 = { algorithm: Alg.AES, keyBits: 128, mode: Alg.CFB } as const;
const PARENTS = [
  ['ECC', srkTemplate()],
  ['RSA', rsaSrkTemplate()],
] as const;
const INNER = [undefined, 128] as const;

const NO_TICKET = { tag: St.HASHCHECK, hierarchy: Rh.NULL, digest: NOTHING };
const SCHEMES = {
  ECC: { scheme: Alg.ECDSA, hashAlg: Alg.SHA256 },
  RSA: { scheme: Alg.RSASSA, hashAlg: Alg.SHA256 },
} as const;

function keyPair(kind: keyof typeof SCHEMES): { publicKey: KeyObject; privateKey: KeyObject } {
  return kind === 'ECC'
    ? generateKeyPairSync('ec', { namedCurve: 'P-256' })
    : generateKeyPairSync('rsa', { modulusLength: 2048 });
}

/** Data that may go to any parent. */
function movableTemplate(inner: 128 | undefined): PublicArea {
  return publicArea({
    type: Alg.KEYEDHASH,
    nameAlg: Alg.SHA256,
    objectAttributes: A.userWithAuth | A.noDA | (inner === undefined ? 0 : A.encryptedDuplication),
    authPolicy: policyDigest(POLICY),
    parameters: { scheme: { scheme: Alg.NULL } },
    unique: NOTHING,
  });
}

describe('tpm2-ts-bindings and tpm2-tools: duplicates', () => {
  let tools: Tpm2Tools;
  withSuiteTools((made) => {
    tools = made;
  });

  /** What of a duplicate goes from one to the other in files: `moved.*`. */
  function writeWrapped(wrapped: Wrapped): void {
    tools.writeAs('moved.pub', publicFile, wrapped.objectPublic);
    tools.writeAs('moved.priv', privateFile, wrapped.duplicate);
    tools.writeAs('moved.seed', seedFile, wrapped.inSymSeed);
    tools.write('moved.key', wrapped.encryptionKey);
  }

  const readWrapped = (inner: 128 | undefined): Wrapped => ({
    encryptionKey: inner === undefined ? NOTHING : concat(tools.bytes('moved.key')),
    objectPublic: tools.read('object.pub', publicFile),
    duplicate: tools.read('moved.priv', privateFile),
    inSymSeed: tools.read('moved.seed', seedFile),
    symmetricAlg: inner === undefined ? { algorithm: Alg.NULL } : AES_128,
  });

  const importLine = (inner: 128 | undefined): string =>
    `tpm2_import -Q -C parent.ctx -u moved.pub -i moved.priv -s moved.seed -r imported.priv${inner === undefined ? '' : ' -k moved.key -G aes'}`;

  /** The tools import what `writeWrapped` wrote, and give `data` out; they refuse it where a part was changed. */
  async function toolsTake(wrapped: Wrapped, inner: 128 | undefined, data: Buffer): Promise<void> {
    writeWrapped(wrapped);
    await tools.run(importLine(inner));
    await tools.run('tpm2_load -Q -C parent.ctx -u moved.pub -r imported.priv -c imported.ctx');
    await tools.run('tpm2_unseal -Q -c imported.ctx -o out');
    assert.deepEqual(tools.bytes('out'), data);
    writeWrapped({ ...wrapped, duplicate: flip(wrapped.duplicate) });
    await tools.refused(importLine(inner), /integrity check failed/);
    if (inner === undefined) return;
    // With another key the sizes in front come out as anything.
    writeWrapped({ ...wrapped, encryptionKey: flip(wrapped.encryptionKey) });
    await tools.refused(importLine(inner), /integrity check failed|wrong size|not enough octets/);
  }

  /** We import and give `data` out, and refuse a changed one. */
  async function weTake(tpm: Tpm, parent: ObjectEntity, wrapped: Wrapped, data: Buffer): Promise<void> {
    const send = (changed: Partial<Wrapped>) =>
      tpm.run(Import, { parentHandle: withPassword(parent) }, { ...wrapped, ...changed });
    const { outPrivate } = await send({});
    await withChild(tpm, parent, { outPrivate, outPublic: wrapped.objectPublic }, async (item) => {
      const { outData } = await inSession(tpm, { kind: 'hmac', salt: parent, encrypt: 'out' }, (session) =>
        tpm.run(Unseal, { itemHandle: withSession(item, session) }, {}),
      );
      assert.deepEqual(outData, data);
    });
    await assert.rejects(send({ duplicate: flip(wrapped.duplicate) }), says('INTEGRITY'));
    if (wrapped.symmetricAlg.algorithm !== Alg.NULL) {
      await assert.rejects(
        send({ encryptionKey: flip(wrapped.encryptionKey) }),
        says('INTEGRITY', 'SIZE', 'INSUFFICIENT'),
      );
    }
  }

  for (const [kind, template] of PARENTS) {
    for (const inner of INNER) {
      const wrapping = `for a parent of ${kind}, inner wrapper ${inner ?? 'none'}`;

      it(`tpm2_import takes what our Duplicate and our software wrapped, ${wrapping}`, async () => {
        const data = randomBytes(40);
        const { objectPublic, sensitive } = softwareSealed(data);
        const { duplicated, inSoftware } = await tools.direct((tpm) =>
          withPrimary(tpm, template, async (parent) => {
            await tools.saveContext(tpm, parent, 'parent.ctx');
            const made = await create(tpm, parent, movableTemplate(inner), { data });
            const duplicate = (object: ObjectEntity) =>
              inSession(tpm, { kind: 'policy' }, async (session): Promise<Wrapped> => {
                await runPolicy(tpm, session, POLICY);
                const symmetricAlg = inner === undefined ? ({ algorithm: Alg.NULL } as const) : AES_128;
                const out = await tpm.run(
                  Duplicate,
                  { objectHandle: withSession(object, session), newParentHandle: parent },
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
            return {
              duplicated: await withChild(tpm, parent, made, duplicate),
              inSoftware: wrapForImport(
                parent.publicArea.value,
                objectPublic,
                sensitive,
                inner === undefined ? {} : { inner },
              ),
            };
          }),
        );
        await toolsTake(duplicated, inner, data);
        await toolsTake(inSoftware, inner, data);
      });

      it(`our Import and our software take what tpm2_duplicate wrapped, ${wrapping}`, async () => {
        const data = randomBytes(40);
        const pair = keyPair(kind);
        const area = softwareKeyPublic(pair.publicKey, { use: 'storage' });
        tools.write('data', data);
        tools.write('policy', policyDigest(POLICY));
        await tools.run('tpm2_createprimary -Q -C o -G ecc -c source.ctx');
        await tools.run(
          `tpm2_create -Q -C source.ctx -i data -L policy -a userwithauth|noda${inner === undefined ? '' : '|encryptedduplication'} -u object.pub -r object.priv`,
        );
        await tools.run('tpm2_load -Q -C source.ctx -u object.pub -r object.priv -c object.ctx');
        const duplicate = (parent: string) =>
          tools.inSession('--policy-session', async () => {
            await tools.run('tpm2_policycommandcode -Q -S session.ctx TPM2_CC_Duplicate');
            await tools.run(
              `tpm2_duplicate -Q -C ${parent} -c object.ctx -p session:session.ctx -r moved.priv -s moved.seed ${inner === undefined ? '-G null' : '-G aes -o moved.key'}`,
            );
          });

        await tools.direct((tpm) =>
          withPrimary(tpm, template, (parent) => tools.saveContext(tpm, parent, 'parent.ctx')),
        );
        await duplicate('parent.ctx');
        await tools.direct((tpm) =>
          withPrimary(tpm, template, (parent) => weTake(tpm, parent, readWrapped(inner), data)),
        );

        tools.writeAs('software.pub', publicFile, area);
        await tools.run('tpm2_loadexternal -Q -C o -u software.pub -c software.ctx');
        await duplicate('software.ctx');
        const wrapped = readWrapped(inner);
        const key = { key: area.value, privateKey: pair.privateKey };
        assert.deepEqual(unwrapDuplicate(key, wrapped).sensitive, data);
        assert.throws(
          () => unwrapDuplicate(key, { ...wrapped, duplicate: flip(wrapped.duplicate) }),
          has('malformed'),
        );
        if (inner === undefined) return;
        assert.throws(
          () => unwrapDuplicate(key, { ...wrapped, encryptionKey: flip(wrapped.encryptionKey) }),
          has('malformed'),
        );
      });
    }

    for (const type of ['ECC', 'RSA'] as const) {
      it(`we import and use the ${type} key that tpm2_duplicate wrapped without a TPM, for a parent of ${kind}`, async () => {
        const pair = keyPair(type);
        tools.write(
          'key.pem',
          pair.privateKey.export({ type: type === 'ECC' ? 'sec1' : 'pkcs1', format: 'pem' }),
        );
        await tools.direct((tpm) =>
          withPrimary(tpm, template, async (parent) => {
            tools.writeAs('parent.pub', publicFile, parent.publicArea);
          }),
        );
        await tools.run(
          `tpm2_duplicate -Q -T none -U parent.pub -k key.pem -G ${type.toLowerCase()} -u object.pub -r moved.priv -s moved.seed`,
        );
        const wrapped = readWrapped(undefined);
        const message = randomBytes(32);
        const digest = createHash('sha256').update(message).digest();
        await tools.direct((tpm) =>
          withPrimary(tpm, template, async (parent) => {
            const send = (changed: Wrapped) =>
              tpm.run(Import, { parentHandle: withPassword(parent) }, changed);
            const { outPrivate } = await send(wrapped);
            const sign = (key: ObjectEntity) =>
              tpm.run(
                Sign,
                { keyHandle: withPassword(key) },
                { digest, inScheme: SCHEMES[type], validation: NO_TICKET },
              );
            const loaded = { outPrivate, outPublic: wrapped.objectPublic };
            const { signature } = await withChild(tpm, parent, loaded, sign);
            const own = softwareKeyPublic(pair.publicKey, { use: 'sign' });
            assert.ok(verifySignature(own.value, message, signature));
            assert.ok(!verifySignature(own.value, flip(message), signature));
            await assert.rejects(send({ ...wrapped, duplicate: flip(wrapped.duplicate) }), says('INTEGRITY'));
          }),
        );
      });
    }
  }
});
