import assert from 'node:assert/strict';
import fc from 'fast-check';
import {
  decode,
  encode,
  type FencingStatement,
  type MigrateOrder,
  signFencing,
  signingKeyFromSeed,
  signMigrateOrder,
  verifyFencing,
  verifyMigrateOrder,
} from 'vtpm-proto';

const toolstack = signingKeyFromSeed(Buffer.alloc(32, 1));
const other = signingKeyFromSeed(Buffer.alloc(32, 2));

function order(overrides: Partial<MigrateOrder> = {}): MigrateOrder {
  return {
    format: 1,
    managerId: Buffer.alloc(32, 3),
    toolstackKey: toolstack.publicKey,
    vtpmUuid: Buffer.alloc(16, 4),
    vmUuid: Buffer.alloc(16, 5),
    destination: Buffer.alloc(32, 6),
    expectedEpoch: 7n,
    leastGeneration: 8n,
    migrationId: Buffer.alloc(16, 9),
    bootId: Buffer.alloc(16, 10),
    expiresAtMonotonicMs: 11n,
    mode: 'LIVE',
    dryRun: false,
    description: Buffer.from('{}'),
    ...overrides,
  };
}

function statement(overrides: Partial<FencingStatement> = {}): FencingStatement {
  return {
    format: 1,
    toolstackKey: toolstack.publicKey,
    vtpmUuid: Buffer.alloc(16, 4),
    host: Buffer.alloc(32, 6),
    lastGeneration: 7n,
    method: 'its power was cut',
    at: 8n,
    ...overrides,
  };
}

const SIGNED = [
  {
    what: 'migrate orders',
    type: 'SignedMigrateOrder',
    body: 'order',
    sign: (key = toolstack, changed: object = {}) => signMigrateOrder(key, order(changed)),
    verify: verifyMigrateOrder,
    field: 'migrationId',
  },
  {
    what: 'fencing statements',
    type: 'SignedFencing',
    body: 'statement',
    sign: (key = toolstack, changed: object = {}) => signFencing(key, statement(changed)),
    verify: verifyFencing,
    field: 'host',
  },
] as const;

for (const { what, type, body, sign, verify, field } of SIGNED) {
  describe(what, () => {
    const check = verify as (signed: object) => object;

    it('verify over the bytes that travelled', () => {
      const there = decode(type, encode(type, sign() as never));
      assert.equal(Buffer.from((check(there) as MigrateOrder).vtpmUuid).toString('hex'), '04'.repeat(16));
    });

    it('are refused with any one bit flipped', () => {
      const good = sign() as unknown as Record<string, Uint8Array>;
      fc.assert(
        fc.property(fc.constantFrom(body, 'signature'), fc.nat(), (name, position) => {
          const bad = { ...good, [name]: Buffer.from(good[name]!) };
          const bit = position % (bad[name]!.length * 8);
          bad[name]![bit >> 3]! ^= 1 << (bit & 7);
          assert.throws(() => check(bad), { name: 'ProtoError' });
        }),
      );
    });

    it('are refused by another key than the one they name, of another length, of a newer format', () => {
      assert.throws(() => check(sign(other)), { code: 'forged' });
      assert.throws(() => check(sign(toolstack, { [field]: Buffer.alloc(15) })), { code: 'malformed' });
      assert.throws(() => check(sign(toolstack, { format: 2 })), { code: 'newer-format' });
      assert.throws(() => check(sign(toolstack, { format: 0 })), { code: 'malformed' });
    });
  });
}

it('a fencing statement does not pass for a migrate order', () => {
  const { order: bytes } = signMigrateOrder(toolstack, order());
  const { signature } = signFencing(toolstack, statement());
  assert.throws(() => verifyMigrateOrder({ order: bytes, signature }), { code: 'forged' });
});
