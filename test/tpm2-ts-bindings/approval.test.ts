import assert from 'node:assert/strict';
import { generateKeyPairSync, randomBytes } from 'node:crypto';
import fc from 'fast-check';
import {
  Alg,
  type Approval,
  type ApprovalRequest,
  approvalRequest,
  authorityPem,
  authorityPublic,
  embed,
  NvAttribute,
  nvEntity,
  readApproval,
  readApprovalRequest,
  signApproval,
  TpmError,
  tpmsNvPublic,
  verifyApproval,
} from 'tpm2-ts-bindings';
import { isA } from '../support/is-a.js';

const index = (attributes: number) =>
  nvEntity(
    embed(tpmsNvPublic, {
      nvIndex: 0x01810001,
      nameAlg: Alg.SHA256,
      attributes,
      authPolicy: Buffer.alloc(0),
      dataSize: 8,
    }),
  );
const READABLE = NvAttribute.AUTHREAD | NvAttribute.OWNERWRITE | NvAttribute.WRITTEN;
const counter = index(READABLE | NvAttribute.COUNTER);
const scope = { purpose: 'a test', subject: randomBytes(16), counter };
const pair = (key: ReturnType<typeof generateKeyPairSync>) => ({
  publicPem: key.publicKey.export({ type: 'spki', format: 'pem' }) as string,
  privatePem: key.privateKey.export({ type: 'pkcs8', format: 'pem' }) as string,
});
const AUTHORITY = pair(generateKeyPairSync('ec', { namedCurve: 'P-256' }));
const usage = (error: unknown) => isA(error, TpmError) && error.code === 'usage';
const hex = (bytes: number) => randomBytes(bytes).toString('hex');

const request = (change: Partial<Parameters<typeof approvalRequest>[1]> = {}): ApprovalRequest =>
  approvalRequest(scope, {
    label: 'firmware 1',
    createdAt: '2020-01-01T00:00:00Z',
    pcrSelection: 'sha256:0,7+sha384:4',
    pcrs: { 'sha256:0': hex(32), 'sha256:7': hex(32), 'sha384:4': hex(48) },
    counter: 1n,
    ...change,
  });
const copy = <T>(value: T): T => JSON.parse(JSON.stringify(value)) as T;

describe('approvals of platform states', () => {
  it('made, signed and verified without a TPM, over JSON', () => {
    for (const [key, scheme] of [
      [AUTHORITY, undefined],
      [pair(generateKeyPairSync('rsa', { modulusLength: 2048 })), 'rsapss'],
    ] as const) {
      const approval = readApproval(
        copy(signApproval(copy(request()), key.privatePem, scheme && { scheme })),
      );
      assert.equal(verifyApproval(approval, key.publicPem, scope), true);
      assert.equal(verifyApproval(approval, key.publicPem, { ...scope, purpose: 'another' }), false);
      assert.equal(verifyApproval(approval, key.publicPem, { ...scope, subject: randomBytes(16) }), false);
      const other = index(READABLE | NvAttribute.COUNTER | NvAttribute.NO_DA);
      assert.equal(verifyApproval(approval, key.publicPem, { ...scope, counter: other }), false);
    }
  });

  it('any change of what is signed is noticed, by signer and verifier', () => {
    const asked = request();
    const approval = signApproval(asked, AUTHORITY.privatePem);
    const field = fc.constantFrom('sha256:0', 'sha256:7', 'sha384:4', 'counter', 'policyDigest');
    fc.assert(
      fc.property(field, fc.nat(), (name, at) => {
        const flip = (text: string): string => {
          const i = at % text.length;
          return text.slice(0, i) + (text[i] === '1' ? '2' : '1') + text.slice(i + 1);
        };
        const change = <T extends Approval | ApprovalRequest>(of: T): T =>
          name === 'counter' || name === 'policyDigest'
            ? { ...of, [name]: flip(of[name]) }
            : { ...of, pcrs: { ...of.pcrs, [name]: flip(of.pcrs[name] ?? '') } };
        assert.equal(verifyApproval(change(approval), AUTHORITY.publicPem, scope), false);
        assert.throws(() => signApproval(change(asked), AUTHORITY.privatePem), usage);
      }),
    );
    const signature = Buffer.from(approval.signature.base64, 'base64');
    for (let bit = 0; bit < signature.length * 8; bit++) {
      const bytes = Buffer.from(signature);
      bytes[bit >> 3] = bytes[bit >> 3]! ^ (1 << (bit & 7));
      const changed = { ...approval, signature: { ...approval.signature, base64: bytes.toString('base64') } };
      assert.equal(verifyApproval(changed, AUTHORITY.publicPem, scope), false, `bit ${bit}`);
    }
  });

  it('a request over an index that can be set back is not signed', () => {
    for (const type of [0, NvAttribute.BITS, NvAttribute.EXTEND, NvAttribute.PIN_PASS]) {
      const asked = { ...request(), counterPublic: index(READABLE | type).nvPublic.bytes.toString('hex') };
      assert.throws(() => signApproval(asked, AUTHORITY.privatePem), /no counter/);
    }
  });

  it('whatever is read gives a value or a usage error', () => {
    const asked = request();
    const approval = signApproval(asked, AUTHORITY.privatePem);
    const holed = (of: object) =>
      fc
        .record({ key: fc.constantFrom(...Object.keys(of)), value: fc.jsonValue() })
        .map(({ key, value }) => ({ ...of, [key]: value }));
    for (const [read, of] of [
      [readApproval, approval],
      [readApprovalRequest, asked],
    ] as const) {
      fc.assert(
        fc.property(fc.oneof(fc.jsonValue(), holed(of)), (value) => {
          try {
            read(value);
          } catch (error) {
            if (!isA(error, TpmError)) throw error;
          }
        }),
      );
    }
    assert.throws(() => readApproval({ ...approval, format: 2 }), /format 2/);
    assert.throws(() => request({ pcrs: { 'sha256:0': hex(32) } }), usage);
    assert.throws(() => request({ counter: 1n << 64n }), usage);
  });

  it('an authority is a key that TPMs verify with, and its public half', () => {
    assert.equal(authorityPem(AUTHORITY.privatePem), AUTHORITY.publicPem);
    assert.deepEqual(authorityPublic(AUTHORITY.privatePem), authorityPublic(AUTHORITY.publicPem));
    for (const key of [
      generateKeyPairSync('ed25519'),
      generateKeyPairSync('ec', { namedCurve: 'P-521' }),
      generateKeyPairSync('rsa', { modulusLength: 1024 }),
      generateKeyPairSync('rsa', { modulusLength: 2048, publicExponent: 3 }),
    ]) {
      assert.throws(() => authorityPem(pair(key as never).publicPem), usage);
    }
    assert.throws(() => authorityPem('no key'), /PEM/);
  });
});
