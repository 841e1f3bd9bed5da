import assert from 'node:assert/strict';
import { createHash, randomBytes } from 'node:crypto';
import {
  ObjectAttribute as A,
  Alg,
  attestationKeyTemplate,
  type Command,
  ContextLoad,
  commandHash,
  embed,
  type HandleEntities,
  type HandleNames,
  inSession,
  NvAttribute as N,
  NV_DefineSpace,
  NV_Increment,
  NV_Read,
  NV_Write,
  objectEntity,
  publicArea,
  Rh,
  readNvIndex,
  Sign,
  St,
  sealedTemplate,
  srkTemplate,
  tpm2b,
  tpmsNvPublic,
  Unseal,
  verifySignature,
  withPassword,
  withSession,
} from 'tpm2-ts-bindings';
import { NOTHING, withPrimary } from '../support/tpm-fixture.js';
import { flip, type Tpm2Tools, withSuiteTools } from '../support/tpm2-tools.js';
import { privateFile, publicFile, readContextFile, signatureFile } from '../support/tpm2-tools-files.js';
import { create, has, OWNER, says, withChild } from './make.js';

describe('tpm2-ts-bindings and tpm2-tools: objects, contexts and NV', () => {
  let tools: Tpm2Tools;
  withSuiteTools((made) => {
    tools = made;
  });

  it('a context that we saved is used by the tools, and a changed one is not', async () => {
    const name = await tools.direct((tpm) =>
      withPrimary(tpm, srkTemplate(), async (key) => {
        await tools.saveContext(tpm, key, 'ours.ctx');
        return key.name;
      }),
    );
    await tools.run('tpm2_readpublic -Q -c ours.ctx -n ours.name -o ours.pub');
    assert.deepEqual(tools.bytes('ours.name'), name);
    assert.deepEqual(objectEntity(0, tools.read('ours.pub', publicFile)).name, name);
    await tools.run('tpm2_create -Q -C ours.ctx -G ecc -u child.pub -r child.priv');
    // In the blob that the TPM protects, past the heads.
    tools.write('changed.ctx', flip(tools.bytes('ours.ctx'), 200));
    await tools.refused('tpm2_readpublic -Q -c changed.ctx', /integrity check failed/);
  });

  it('a context that the tools saved is used by us, and a changed one is not', async () => {
    await tools.run('tpm2_createprimary -Q -C o -G ecc -c theirs.ctx');
    await tools.run('tpm2_readpublic -Q -c theirs.ctx -n theirs.name');
    await tools.direct(async (tpm) => {
      await tools.withContext(tpm, 'theirs.ctx', async (key) => {
        assert.deepEqual(key.name, tools.bytes('theirs.name'));
        await create(tpm, key, sealedTemplate(randomBytes(32)), { data: randomBytes(8) });
      });
      assert.throws(() => readContextFile(flip(tools.bytes('theirs.ctx'), 0)), has('malformed'));
      const { context } = readContextFile(tools.bytes('theirs.ctx'));
      for (const at of [7, context.bytes.length - 1]) {
        await assert.rejects(
          tpm.run(ContextLoad, {}, { context: { ...context, bytes: flip(context.bytes, at) } }),
          says('INTEGRITY'),
          `byte ${at}`,
        );
      }
    });
  });

  it('signing keys and their files go both ways, and changed signatures verify nowhere', async () => {
    const [message, other] = [randomBytes(50), randomBytes(50)];
    tools.write('message', message);
    tools.write('other', other);
    const files = '-u key.pub -r key.priv';
    const verify = 'tpm2_verifysignature -Q -c key.ctx -g sha256 -s signature -m';

    // A key of ours, signs with the tools.
    await tools.direct((tpm) =>
      withPrimary(tpm, srkTemplate(), async (parent) => {
        await tools.saveContext(tpm, parent, 'parent.ctx');
        const { value } = attestationKeyTemplate();
        const made = await create(
          tpm,
          parent,
          publicArea({ ...value, objectAttributes: value.objectAttributes & ~A.restricted }),
        );
        tools.writeAs('key.pub', publicFile, made.outPublic);
        tools.writeAs('key.priv', privateFile, made.outPrivate);
      }),
    );
    await tools.run(`tpm2_load -Q -C parent.ctx ${files} -c key.ctx`);
    await tools.run('tpm2_sign -Q -c key.ctx -g sha256 -o signature message');
    const key = () => tools.read('key.pub', publicFile).value;
    assert.ok(verifySignature(key(), message, tools.read('signature', signatureFile)));
    assert.ok(!verifySignature(key(), other, tools.read('signature', signatureFile)));

    // A key of theirs, signs with us.
    await tools.run(`tpm2_create -Q -C parent.ctx -G ecc256:ecdsa-sha256 ${files} -c key.ctx`);
    await tools.direct((tpm) =>
      tools.withContext(tpm, 'parent.ctx', (parent) => {
        const loaded = {
          outPublic: tools.read('key.pub', publicFile),
          outPrivate: tools.read('key.priv', privateFile),
        };
        return withChild(tpm, parent, loaded, async (keyHandle) => {
          const { signature } = await tpm.run(
            Sign,
            { keyHandle: withPassword(keyHandle) },
            {
              digest: createHash('sha256').update(message).digest(),
              inScheme: { scheme: Alg.NULL },
              validation: { tag: St.HASHCHECK, hierarchy: Rh.NULL, digest: NOTHING },
            },
          );
          tools.writeAs('signature', signatureFile, signature);
        });
      }),
    );
    await tools.run(`${verify} message`);
    await tools.refused(`${verify} other`, /signature is not valid/);
  });

  it('an NV index that the tools defined and wrote is read by us', async () => {
    const data = randomBytes(48);
    tools.write('data', data);
    await tools.run(
      'tpm2_nvdefine -Q 0x01500030 -C o -s 48 -p hex:00aabb -a ownerread|ownerwrite|authread|authwrite|policyread',
    );
    await tools.run('tpm2_nvwrite -Q 0x01500030 -C o -i data');
    const read = (auth: Buffer) =>
      tools.direct((tpm) =>
        withPrimary(tpm, srkTemplate(), async (salt) => {
          const index = await readNvIndex(tpm, 0x01500030, auth);
          assert.ok(index);
          const read = { size: 40, offset: 8 };
          return inSession(tpm, { kind: 'hmac', salt, encrypt: 'out' }, (session) =>
            tpm.run(NV_Read, { authHandle: withSession(index, session), nvIndex: index }, read),
          );
        }),
      );
    assert.deepEqual((await read(Buffer.from('00aabb', 'hex'))).data, data.subarray(8));
    await assert.rejects(read(Buffer.from('aabb', 'hex')), says('AUTH_FAIL'));
    await tools.run('tpm2_nvundefine -Q 0x01500030 -C o');
    assert.equal(await tools.direct((tpm) => readNvIndex(tpm, 0x01500030)), undefined);
  });

  it('an NV index that we defined and wrote is read by the tools', async () => {
    const data = randomBytes(20);
    const auth = Buffer.from('aa00bb', 'hex');
    const name = await tools.direct((tpm) =>
      withPrimary(tpm, srkTemplate(), (salt) =>
        inSession(tpm, { kind: 'hmac', salt, encrypt: 'in' }, async (session) => {
          const publicInfo = embed(tpmsNvPublic, {
            nvIndex: 0x01500031,
            nameAlg: Alg.SHA256,
            attributes: N.AUTHREAD | N.AUTHWRITE | N.NO_DA,
            authPolicy: NOTHING,
            dataSize: data.length,
          });
          await tpm.run(NV_DefineSpace, { authHandle: withSession(OWNER, session) }, { auth, publicInfo });
          const index = await readNvIndex(tpm, 0x01500031, auth);
          assert.ok(index);
          const handles = { authHandle: withSession(index, session), nvIndex: index };
          await tpm.run(NV_Write, handles, { data, offset: 0 });
          return (await readNvIndex(tpm, 0x01500031))?.name.toString('hex');
        }),
      ),
    );
    assert.match(await tools.run('tpm2_nvreadpublic 0x01500031'), new RegExp(`name: ${name}`));
    const read = 'tpm2_nvread -Q 0x01500031 -C 0x01500031 -o out -P hex:';
    await tools.run(`${read}aa00bb`);
    assert.deepEqual(tools.bytes('out'), data);
    await tools.refused(`${read}aabb`, /authorization failure/);
    await tools.run('tpm2_nvundefine -Q 0x01500031 -C o');
  });

  it('cpHash: of the same commands the same as the tools say', async () => {
    const data = randomBytes(20);
    tools.write('data', data);
    await tools.run('tpm2_nvdefine -Q 0x01500032 -C o -s 20 -a ownerread|ownerwrite');
    await tools.run('tpm2_nvdefine -Q 0x01500033 -C o -s 8 -a ownerread|ownerwrite|nt=counter');
    await tools.run('tpm2_createprimary -Q -C o -G ecc -c object.ctx');
    const { item, plain, counter } = await tools.direct(async (tpm) => ({
      item: await tools.withContext(tpm, 'object.ctx', async (object) => object),
      plain: await readNvIndex(tpm, 0x01500032),
      counter: await readNvIndex(tpm, 0x01500033),
    }));
    assert.ok(plain && counter);
    async function same<H extends HandleNames, P>(
      line: string,
      command: Command<H, P, unknown>,
      handles: HandleEntities<H>,
      params: P,
    ): Promise<void> {
      await tools.run(`${line} --cphash hash`);
      assert.deepEqual(commandHash(command, handles, params), tools.read('hash', tpm2b), line);
    }
    await same('tpm2_unseal -Q -c object.ctx', Unseal, { itemHandle: item }, {});
    const authHandle = OWNER;
    await same(
      'tpm2_nvwrite -Q 0x01500032 -C o -i data',
      NV_Write,
      { authHandle, nvIndex: plain },
      { data, offset: 0 },
    );
    await same('tpm2_nvincrement -Q 0x01500033 -C o', NV_Increment, { authHandle, nvIndex: counter }, {});
  });
});
