import fc from 'fast-check';
import { FlipBench } from './flip.js';

const BIT = fc.nat({ max: 7 });
const POSITION = fc.nat({ max: 4000 });
const SUBJECTS = [
  'GetRandom, encrypted',
  'ReadPublic, audited',
  'Unseal, encrypted',
  'Unseal, neither salted nor bound',
  'Unseal, by policy',
  'NV_Read, encrypted',
  'Quote',
  'CreatePrimary, encrypted',
  'Load',
] as const;

/** A sample of what test/long does with every bit. */
describe('tpm2-ts-bindings: one flipped bit of an answer', () => {
  const bench = new FlipBench();
  before(() => bench.start());
  after(() => bench.stop());

  for (const name of SUBJECTS) {
    it(`${name}: is refused, and ends the session`, async () => {
      await fc.assert(
        fc.asyncProperty(POSITION, BIT, (at, bit) => bench.assertRefused(name, at, bit)),
        {
          numRuns: 40,
          // Tag, response code (a success that reads as an error) and the end of the last HMAC.
          examples: [
            [0, 0],
            [2, 0],
            [4, 0],
            [5, 7],
            [5, 0],
          ],
        },
      );
    });
  }

  it('of its size: is refused by the connection', async () => {
    for (const bit of [0, 15, 16, 24, 27, 31]) await bench.assertSizeRefused(bit);
  });

  for (const from of ['CreatePrimary', 'Load', 'ContextLoad'] as const) {
    it(`a handle of ${from}: nothing is authorised with it`, async () => {
      for (const bit of [0, 7, 24, 25, 28, 31]) await bench.assertHandleUseless(from, bit);
    });
  }

  for (const kind of ['salted', 'unsalted'] as const) {
    it(`StartAuthSession, ${kind}: it does not open, or fails at its first use`, async () => {
      await fc.assert(
        fc.asyncProperty(POSITION, BIT, (at, bit) =>
          bench.assertSessionUseless(
            kind === 'salted' ? { kind: 'hmac', salt: bench.srk } : { kind: 'hmac' },
            at,
            bit,
          ),
        ),
        // The lowest bit of the handle: another session's.
        { numRuns: 40, examples: [[9, 0]] },
      );
    });
  }
});
