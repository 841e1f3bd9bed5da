import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import fc from 'fast-check';
import nacl from 'tweetnacl';
import {
  boxKeyPair,
  decode,
  encode,
  openBox,
  type SignedTicket,
  sealBox,
  signDelegation,
  signingKeyFromSeed,
  signTicket,
  type Ticket,
  ticketDigest,
  verifyTicketChain,
} from 'vtpm-proto';

const toolstack = signingKeyFromSeed(Buffer.alloc(32, 1));
const delegate = signingKeyFromSeed(Buffer.alloc(32, 2));
const uuid = Buffer.alloc(16, 7);

function delegation(overrides: object = {}) {
  return signDelegation(toolstack, {
    format: 1,
    toolstackKey: toolstack.publicKey,
    delegateKey: delegate.publicKey,
    vtpmUuid: uuid,
    vmUuid: uuid,
    verbs: ['MANUFACTURE', 'COLD'],
    ...overrides,
  });
}

function ticket(overrides: Partial<Ticket> = {}): Ticket {
  return {
    format: 1,
    managerId: Buffer.alloc(32),
    vtpmUuid: uuid,
    vmUuid: uuid,
    vmRunId: uuid,
    workerPublicKey: Buffer.alloc(32),
    imageDigest: Buffer.alloc(32),
    isolation: 'sandbox',
    expectedEpoch: 0n,
    verbs: ['COLD'],
    bootId: uuid,
    expiresAtMonotonicMs: 1n,
    ...overrides,
  };
}

describe('tickets and delegations', () => {
  it('verify over the bytes that travelled', () => {
    const signed = decode(
      'SignedTicket',
      encode('SignedTicket', signTicket(delegate, ticket(), delegation())),
    );
    assert.equal(verifyTicketChain(signed).vtpmUuid, '07070707-0707-0707-0707-070707070707');
  });

  it('are what tweetnacl signs and verifies too', () => {
    const pair = nacl.sign.keyPair.fromSeed(new Uint8Array(32).fill(1));
    assert.deepEqual(Buffer.from(pair.publicKey), toolstack.publicKey);
    const { delegation: bytes, signature } = delegation();
    const message = Buffer.concat([Buffer.from('vtpm.v1 delegation\0'), bytes]);
    assert.ok(nacl.sign.detached.verify(message, signature, pair.publicKey));
  });

  it('are refused with any one bit flipped', () => {
    const good = signTicket(delegate, ticket(), delegation());
    const fields = ['ticket', 'signature', 'delegation', 'delegationSignature'] as const;
    fc.assert(
      fc.property(fc.constantFrom(...fields), fc.nat(), (field, position) => {
        const bad: SignedTicket = { ...good, [field]: Buffer.from(good[field]) };
        const bit = position % (bad[field].length * 8);
        bad[field][bit >> 3]! ^= 1 << (bit & 7);
        assert.throws(() => verifyTicketChain(bad), { name: 'ProtoError' });
      }),
      { numRuns: 400 },
    );
  });

  it('are refused where ticket and delegation speak of different things', () => {
    for (const overrides of [
      { vtpmUuid: Buffer.alloc(16) },
      { vmUuid: Buffer.alloc(16) },
      { verbs: ['RESUME' as const] },
    ]) {
      assert.throws(() => verifyTicketChain(signTicket(delegate, ticket(overrides), delegation())), {
        code: 'forged',
      });
    }
    const other = signingKeyFromSeed(Buffer.alloc(32, 3));
    assert.throws(() => verifyTicketChain(signTicket(other, ticket(), delegation())), { code: 'forged' });
  });

  it('of a newer format are refused by name', () => {
    assert.throws(() => verifyTicketChain(signTicket(delegate, ticket({ format: 2 }), delegation())), {
      code: 'newer-format',
    });
    assert.throws(() => verifyTicketChain(signTicket(delegate, ticket(), delegation({ format: 9 }))), {
      code: 'newer-format',
    });
  });
});

describe('Load boxes', () => {
  const worker = boxKeyPair();
  const manager = boxKeyPair();
  const claim = {
    ticketDigest: ticketDigest(signTicket(delegate, ticket(), delegation())),
    loadId: randomBytes(16),
    libtpmsVersion: '0.9.2',
  };

  it('open for the named pair of keys and for nobody else', () => {
    const boxed = sealBox('LoadClaim', claim, manager.publicKey, worker);
    assert.equal(openBox('LoadClaim', boxed, worker.publicKey, manager).libtpmsVersion, '0.9.2');
    assert.throws(() => openBox('LoadClaim', boxed, boxKeyPair().publicKey, manager), { code: 'forged' });
    assert.throws(() => openBox('LoadClaim', boxed, worker.publicKey, boxKeyPair()), { code: 'forged' });
  });

  it('are what tweetnacl makes and opens too', () => {
    const theirs = nacl.box.keyPair.fromSecretKey(worker.secretKey);
    assert.deepEqual(theirs.publicKey, worker.publicKey);
    const { nonce, box } = sealBox('LoadClaim', claim, manager.publicKey, worker);
    const plain = nacl.box.open(box, nonce, worker.publicKey, manager.secretKey);
    assert.ok(plain);
    const again = nacl.box(plain, nonce, worker.publicKey, manager.secretKey);
    assert.deepEqual(again, box);
    assert.equal(
      openBox('LoadClaim', { nonce, box: again }, manager.publicKey, worker).libtpmsVersion,
      '0.9.2',
    );
  });

  it('are not made for a key of small order', () => {
    assert.throws(() => sealBox('LoadClaim', claim, new Uint8Array(32), worker), { code: 'forged' });
  });

  it('are never taken for the other direction', () => {
    const boxed = sealBox('LoadClaim', claim, manager.publicKey, worker);
    assert.throws(() => openBox('LoadGrant', boxed, worker.publicKey, manager), { code: 'forged' });
  });
});
