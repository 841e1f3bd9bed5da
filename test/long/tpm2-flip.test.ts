import assert from 'node:assert/strict';
import { FlipBench } from '../tpm2-ts-bindings/flip.js';

const bits = (count: number): number[] => Array.from({ length: count }, (_, bit) => bit);

describe('tpm2-ts-bindings: each bit of an answer, flipped', () => {
  const bench = new FlipBench();
  before(() => bench.start());
  after(() => bench.stop());

  it('all that an HMAC or the format covers is refused', async () => {
    assert.equal(bench.names.length, 9);
    for (const name of bench.names) {
      const length = await bench.protectedBytes(name);
      for (let at = 0; at < length; at++) for (const bit of bits(8)) await bench.assertRefused(name, at, bit);
    }
  });

  it('the size is refused by the connection', async () => {
    for (const bit of bits(32)) await bench.assertSizeRefused(bit);
  });

  for (const from of ['CreatePrimary', 'Load', 'ContextLoad'] as const) {
    it(`nothing is authorised with a handle of ${from}`, async () => {
      for (const bit of bits(32)) await bench.assertHandleUseless(from, bit);
    });
  }

  it('no session opens and works', async () => {
    // The answer without its size: six bytes of header, handle and nonce.
    const length = 6 + 4 + 2 + 32;
    for (let at = 0; at < length; at++) {
      for (const bit of bits(8)) {
        await bench.assertSessionUseless({ kind: 'hmac', salt: bench.srk }, at, bit);
        await bench.assertSessionUseless({ kind: 'hmac' }, at, bit);
      }
    }
  });
});
