import fc from 'fast-check';
import { cases, judge } from '../tpm2-ts-bindings/fuzz.js';
import { recordAnswers } from '../tpm2-ts-bindings/recorded.js';

describe('tpm2-ts-bindings: answers of any bytes, many of them', () => {
  it('200,000 answers give a value or a named error, in bounded memory', async () => {
    const recorded = await recordAnswers();
    await fc.assert(
      fc.asyncProperty(cases(recorded), async (each) => void (await judge(each))),
      { numRuns: 200_000 },
    );
  });
});
