import assert from 'node:assert/strict';
import { generateKeyPairSync } from 'node:crypto';
import {
  Alg,
  CreatePrimary,
  createPrimary,
  createTpm,
  FlushContext,
  Ht,
  listHandles,
  openSocket,
  openTpm,
  publicArea,
  readPcrs,
  readRandom,
  softwareKeyPublic,
  softwareSealed,
  srkTemplate,
  type Tpm,
  unwrapDuplicate,
  verifySignature,
  whileLoaded,
  wrapForImport,
} from 'tpm2-ts-bindings';
import { startSwtpm } from '../support/swtpm.js';
import { assertNothingLeaked, NOTHING } from '../support/tpm-fixture.js';
import { dataTemplate, has } from './make.js';

/** A TPM that answers every command with success and these parameters. */
function saying(parameters: string): Tpm {
  const body = Buffer.from(parameters.replaceAll(' ', ''), 'hex');
  const head = Buffer.from('80010000000000000000', 'hex');
  head.writeUInt32BE(head.length + body.length, 2);
  return createTpm({
    transmit: async () => Buffer.concat([head, body]),
    close: async () => undefined,
  });
}

describe('tpm2-ts-bindings: who says other things than asked', () => {
  it('a list of handles that does not go on, or of another type, is refused', async () => {
    const again = '01 00000001 00000001 80000001';
    await assert.rejects(listHandles(saying(again), Ht.TRANSIENT), has('malformed'));
    await assert.rejects(
      listHandles(saying('00 00000001 00000001 02000001'), Ht.TRANSIENT),
      has('malformed'),
    );
    assert.deepEqual(await listHandles(saying('00 00000001 00000001 80000001'), Ht.TRANSIENT), [0x80000001]);
  });

  it('registers that were not asked for, or without values, are refused', async () => {
    const selection = [{ hash: Alg.SHA256, pcrs: [0] }];
    const value = `0020${'00'.repeat(32)}`;
    await assert.rejects(
      readPcrs(saying(`00000001 00000001 000b 03 020000 00000001 ${value}`), selection),
      has('malformed'),
    );
    await assert.rejects(
      readPcrs(saying('00000001 00000001 000b 03 010000 00000000'), selection),
      has('malformed'),
    );
    await assert.rejects(
      readPcrs(saying('00000001 00000001 000b 03 000000 00000000'), selection),
      has('usage'),
    );
    const [read] = await readPcrs(saying(`00000001 00000001 000b 03 010000 00000001 ${value}`), selection);
    assert.deepEqual(read, Buffer.alloc(32));
  });

  it('more random bytes than one command can ask for are read, fewer than none are not', async () => {
    assert.equal((await readRandom(saying(`8000${'5a'.repeat(0x8000)}`), 0x18000)).length, 0x18000);
    await assert.rejects(readRandom(saying('0000'), 8), has('malformed'));
  });

  it('public areas that hold no key verify nothing, with a named error', () => {
    const signature = { sigAlg: Alg.ECDSA, hash: Alg.SHA256, signatureR: NOTHING, signatureS: NOTHING };
    const rsa = { sigAlg: Alg.RSASSA, hash: Alg.SHA256, sig: Buffer.alloc(256) };
    const { value } = srkTemplate('H-2');
    assert.equal(value.type, Alg.ECC);
    for (const length of [0, 32, 33]) {
      const point = { x: Buffer.alloc(length, 1), y: Buffer.alloc(length, 1) };
      const key = publicArea({ ...value, type: Alg.ECC, unique: point } as typeof value).value;
      assert.throws(() => verifySignature(key, NOTHING, signature), has('malformed'));
    }
    assert.equal(verifySignature(srkTemplate('H-1').value, NOTHING, rsa), false);
    for (const each of [signature, rsa])
      assert.equal(verifySignature(dataTemplate().value, NOTHING, each), false);
  });

  for (const type of ['ec', 'rsa'] as const) {
    it(`a seed that was changed opens no duplicate, with a parent of ${type}`, () => {
      const { publicKey, privateKey } =
        type === 'ec'
          ? generateKeyPairSync('ec', { namedCurve: 'P-256' })
          : generateKeyPairSync('rsa', { modulusLength: 2048 });
      const key = softwareKeyPublic(publicKey, { use: 'storage' }).value;
      const { objectPublic, sensitive } = softwareSealed(Buffer.from('data'));
      const wrapped = wrapForImport(key, objectPublic, sensitive);
      assert.deepEqual(unwrapDuplicate({ key, privateKey }, wrapped), sensitive);
      const inSymSeed = Buffer.from(wrapped.inSymSeed);
      inSymSeed[inSymSeed.length - 1] = (inSymSeed.at(-1) ?? 0) ^ 1;
      assert.throws(() => unwrapDuplicate({ key, privateKey }, { ...wrapped, inSymSeed }), has('malformed'));
    });
  }

  it('an interposer with a storage key of its own TPM is refused by Name', async () => {
    const [honest, own] = await Promise.all([startSwtpm(), startSwtpm()]);
    try {
      const trusted = await openTpm(honest.socket);
      const { name } = await whileLoaded(trusted, createPrimary(trusted, srkTemplate()), async (srk) => srk);
      await whileLoaded(trusted, createPrimary(trusted, srkTemplate(), { name }), async () => undefined);
      await trusted.close();

      const [way, aside] = [await openSocket(honest.socket), await openSocket(own.socket)];
      const substituted = new Set<number>([CreatePrimary.code, FlushContext.code]);
      const tpm = createTpm({
        transmit: (command) =>
          (substituted.has(Buffer.from(command).readUInt32BE(6)) ? aside : way).transmit(command),
        close: async () => void (await Promise.all([way.close(), aside.close()])),
      });
      await assert.rejects(createPrimary(tpm, srkTemplate(), { name }), has('malformed'));
      await tpm.close();
      const after = await openTpm(own.socket);
      await assertNothingLeaked(after);
      await after.close();
    } finally {
      await Promise.all([honest.stop(), own.stop()]);
    }
  });
});
