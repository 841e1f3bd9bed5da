import assert from 'node:assert/strict';
import fc from 'fast-check';
import {
  Alg,
  type Codec,
  concat,
  decode,
  embed,
  embedded,
  encode,
  i32,
  list,
  type Reader,
  sized,
  struct,
  TpmError,
  tagged,
  tpm2b,
  tpmlPcrSelection,
  tpmsClockInfo,
  tpmsNvPublic,
  tpmtPublic,
  tpmtSignature,
  tpmtSymDef,
  u8,
  u16,
  u32,
  u64,
  yesNo,
} from 'tpm2-ts-bindings';
import { isA } from '../support/is-a.js';

const U32 = fc.integer({ min: 0, max: 0xffff_ffff });
const U16 = fc.integer({ min: 0, max: 0xffff });
const U64 = fc.bigInt({ min: 0n, max: 0xffff_ffff_ffff_ffffn });
const BYTES = fc.uint8Array({ maxLength: 300 }).map((bytes) => concat(bytes));

/** Records as literals make them, with a prototype: what decode gives. */
function record<T>(model: { readonly [K in keyof T]: fc.Arbitrary<T[K]> }): fc.Arbitrary<T> {
  return fc.record<T>(model as { [K in keyof T]: fc.Arbitrary<T[K]> }, {
    noNullPrototype: true,
  }) as fc.Arbitrary<T>;
}

function roundTrips<T>(codec: Codec<T>, values: fc.Arbitrary<T>): void {
  fc.assert(
    fc.property(values, (value) => {
      const bytes = encode(codec, value);
      assert.deepEqual(decode(codec, bytes), value);
      // Trailing bytes and every truncation are refused.
      assert.throws(() => decode(codec, concat(bytes, Buffer.of(0))), isMalformed);
      if (bytes.length > 0) assert.throws(() => decode(codec, bytes.subarray(0, -1)), isMalformed);
    }),
    { numRuns: 60 },
  );
}

function isMalformed(error: unknown): boolean {
  return isA(error, TpmError) && error.code === 'malformed';
}

function isUsage(error: unknown): boolean {
  return isA(error, TpmError) && error.code === 'usage';
}

const symDef = fc.oneof(
  fc.constant({ algorithm: Alg.NULL }),
  record({ algorithm: fc.constant(Alg.AES), keyBits: U16, mode: U16 }),
);
const scheme = fc.oneof(
  fc.constant({ scheme: Alg.NULL }),
  record({ scheme: fc.constant(Alg.ECDSA), hashAlg: U16 }),
);
const head = { nameAlg: U16, objectAttributes: U32, authPolicy: BYTES };

describe('tpm2-ts-bindings: codec', () => {
  it('integers survive, at their edges too', () => {
    roundTrips(u8, fc.integer({ min: 0, max: 255 }));
    roundTrips(u16, U16);
    roundTrips(u32, U32);
    roundTrips(i32, fc.integer({ min: -(2 ** 31), max: 2 ** 31 - 1 }));
    roundTrips(yesNo, fc.boolean());
    roundTrips(u64, U64);
  });

  it('u64 edge values: no bit is lost above 2^53 or at the sign', () => {
    for (const [value, hex] of [
      [0n, '0000000000000000'],
      [1n, '0000000000000001'],
      [0xffff_ffffn, '00000000ffffffff'],
      [0x1_0000_0000n, '0000000100000000'],
      [2n ** 53n + 1n, '0020000000000001'],
      [2n ** 63n, '8000000000000000'],
      [2n ** 64n - 1n, 'ffffffffffffffff'],
    ] as const) {
      assert.equal(encode(u64, value).toString('hex'), hex);
      assert.equal(decode(u64, Buffer.from(hex, 'hex')), value);
    }
    assert.throws(() => encode(u64, 2n ** 64n), isUsage);
    assert.throws(() => encode(u64, -1n), isUsage);
  });

  it('a value that does not fit is refused before anything is sent', () => {
    assert.throws(() => encode(u32, 2 ** 32), isUsage);
    assert.throws(() => encode(u32, -1), isUsage);
    assert.throws(() => encode(u16, 1.5), isUsage);
    assert.throws(() => encode(tpm2b, Buffer.alloc(65536)), isUsage);
    assert.throws(() => encode(tpmlPcrSelection, [{ hash: Alg.SHA256, pcrs: [24] }]), isUsage);
  });

  it('structures, lists and unions survive', () => {
    roundTrips(tpm2b, BYTES);
    roundTrips(list(tpm2b), fc.array(BYTES, { maxLength: 8 }));
    roundTrips(sized(struct({ a: u8, b: tpm2b })), record({ a: fc.integer({ min: 0, max: 255 }), b: BYTES }));
    roundTrips(tpmtSymDef, symDef as fc.Arbitrary<never>);
    roundTrips(tpmsClockInfo, record({ clock: U64, resetCount: U32, restartCount: U32, safe: fc.boolean() }));
    roundTrips(
      tpmsNvPublic,
      record({ nvIndex: U32, nameAlg: U16, attributes: U32, authPolicy: BYTES, dataSize: U16 }),
    );
    roundTrips(
      tpmtSignature,
      fc.oneof(
        record({
          sigAlg: fc.constant(Alg.ECDSA),
          hash: U16,
          signatureR: BYTES,
          signatureS: BYTES,
        }),
        record({ sigAlg: fc.constant(Alg.RSAPSS), hash: U16, sig: BYTES }),
      ),
    );
    roundTrips(
      tpmtPublic,
      fc.oneof(
        record({
          type: fc.constant(Alg.ECC),
          ...head,
          parameters: record({
            symmetric: symDef,
            scheme,
            curveID: U16,
            kdf: fc.constant({ scheme: Alg.NULL }),
          }),
          unique: record({ x: BYTES, y: BYTES }),
        }),
        record({
          type: fc.constant(Alg.KEYEDHASH),
          ...head,
          parameters: fc.constant({ scheme: { scheme: Alg.NULL } }),
          unique: BYTES,
        }),
      ) as fc.Arbitrary<never>,
    );
  });

  it('a PCR selection survives as a list of registers', () => {
    roundTrips(
      tpmlPcrSelection,
      fc.array(
        record({
          hash: U16,
          pcrs: fc.uniqueArray(fc.integer({ min: 0, max: 23 })).map((pcrs) => pcrs.sort((a, b) => a - b)),
        }),
        { maxLength: 4 },
      ),
    );
    assert.equal(
      encode(tpmlPcrSelection, [{ hash: Alg.SHA256, pcrs: [0, 2, 7, 23] }]).toString('hex'),
      '00000001000b03850080',
    );
  });

  it('an embedded structure keeps the bytes it came as', () => {
    const codec = embedded(struct({ hash: u16, rest: tpm2b }));
    const value = embed(struct({ hash: u16, rest: tpm2b }), { hash: 11, rest: Buffer.from('abc') });
    assert.deepEqual(decode(codec, encode(codec, value)), value);
    assert.throws(() => decode(codec, Buffer.from('0005000b000161ff', 'hex')), isMalformed);
    assert.throws(() => decode(codec, Buffer.from('0006000b000161ff', 'hex')), isMalformed);
  });

  it('a list that announces more than there is, is refused before memory is taken', () => {
    assert.throws(() => decode(list(u32), Buffer.from('ffffffff00000001', 'hex')), isMalformed);
    assert.throws(() => decode(list(u8), Buffer.from('0000000300', 'hex')), isMalformed);
    let reads = 0;
    const counted = {
      ...u8,
      read: (reader: Reader) => {
        reads++;
        return u8.read(reader);
      },
    };
    const announcing = (count: number, bytes: number) => {
      const message = Buffer.alloc(4 + bytes);
      message.writeUInt32BE(count);
      return message;
    };
    assert.throws(() => decode(list(counted), announcing(5, 4)), isMalformed);
    assert.throws(() => decode(list(counted), announcing(1025, 1025)), isMalformed);
    assert.equal(reads, 0);
    assert.equal(decode(list(counted), announcing(1024, 1024)).length, 1024);
  });

  it('an unknown selector is refused both ways', () => {
    const codec = tagged('kind', u16, { 1: struct({ a: u8 }) });
    assert.throws(() => decode(codec, Buffer.from('000200', 'hex')), isMalformed);
    assert.throws(() => encode(codec, { kind: 2, a: 0 } as never), isUsage);
  });

  it('random bytes give a value or a named error, never another exception', () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 200 }), (bytes) => {
        for (const codec of [tpmtPublic, tpmtSignature, tpmlPcrSelection, tpmsNvPublic] as Codec<unknown>[]) {
          try {
            decode(codec, bytes);
          } catch (error) {
            assert.ok(isMalformed(error), String(error));
          }
        }
      }),
      { numRuns: 300 },
    );
  });
});
