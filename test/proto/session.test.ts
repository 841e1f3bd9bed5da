import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import fc from 'fast-check';
import { publicRandom, sessionCipher } from 'vtpm-proto';

const key = randomBytes(32);
const id = randomBytes(16);
const cipher = sessionCipher(key, id, 5n);

describe('the Save stream cipher', () => {
  it('opens its own frames', () => {
    assert.equal(cipher.openWorker(cipher.sealWorker('SAVE', 1n, Buffer.from('state'))).toString(), 'state');
    assert.equal(cipher.openManager(cipher.sealManager('ACK', 1n, Buffer.from('ack'))).toString(), 'ack');
  });

  it('refuses a frame moved to another sequence, type, session or epoch', () => {
    const frame = cipher.sealWorker('SAVE', 1n, Buffer.from('state'));
    assert.throws(() => cipher.openWorker({ ...frame, sequence: 2n }), { code: 'forged' });
    assert.throws(() => cipher.openWorker({ ...frame, type: 'HELLO' }), { code: 'forged' });
    assert.throws(() => sessionCipher(key, randomBytes(16), 5n).openWorker(frame), { code: 'forged' });
    assert.throws(() => sessionCipher(key, id, 6n).openWorker(frame), { code: 'forged' });
  });

  it('refuses a frame reflected to its sender', () => {
    const { nonce, sealed } = cipher.sealWorker('SAVE', 1n, Buffer.from('state'));
    assert.throws(() => cipher.openManager({ type: 'ACK', sequence: 1n, nonce, sealed }), { code: 'forged' });
  });

  it('refuses every flipped bit of the sealed payload', () => {
    const frame = cipher.sealWorker('SAVE', 1n, Buffer.from('s'));
    for (let bit = 0; bit < frame.sealed.length * 8; bit++) {
      const sealed = Buffer.from(frame.sealed);
      sealed[bit >> 3]! ^= 1 << (bit & 7);
      assert.throws(() => cipher.openWorker({ ...frame, sealed }), { code: 'forged' });
    }
  });
});

describe('random bytes for nonces and salts', () => {
  it('have the length that is asked for, and none is given out twice', () => {
    fc.assert(
      fc.property(fc.array(fc.integer({ min: 1, max: 1500 }), { minLength: 1, maxLength: 40 }), (lengths) => {
        const given = lengths.map((length) => publicRandom(length));
        assert.deepEqual(
          given.map(({ length }) => length),
          lengths,
        );
        // Each is marked with a byte of its own: where memory was shared, another one's mark shows.
        for (const [mark, bytes] of given.entries()) bytes.fill(mark);
        for (const [mark, bytes] of given.entries()) assert.ok(bytes.every((byte) => byte === mark));
      }),
    );
  });
});
