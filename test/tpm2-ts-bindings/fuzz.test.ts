import assert from 'node:assert/strict';
import fc from 'fast-check';
import { type AnyCommand, COMMANDS } from './arbitrary.js';
import { type Case, cases, judge } from './fuzz.js';
import { recordAnswers } from './recorded.js';

describe('tpm2-ts-bindings: answers of any bytes', () => {
  let recorded: ReadonlyMap<number, readonly Buffer[]>;
  before(async () => {
    recorded = await recordAnswers();
  });

  const byCode = (code: number): AnyCommand => {
    const command = COMMANDS.find((each) => each.code === code);
    assert.ok(command);
    return command;
  };
  const given = (command: AnyCommand, params: unknown, answer: Buffer): Case => ({
    command,
    params,
    inSession: false,
    answer: () => Buffer.from(answer),
  });

  it('what a TPM answered is understood again', async () => {
    assert.ok(recorded.size >= 33, `${recorded.size} commands recorded`);
    for (const [code, answers] of recorded) {
      const command = byCode(code);
      for (const answer of answers) {
        const [some] = fc.sample(
          cases(new Map()).filter((each) => each.command === command),
          1,
        );
        assert.ok(some);
        assert.equal(await judge(given(command, some.params, answer)), 'value', command.name);
      }
    }
  });

  it('a value or a named error comes of it, in bounded memory', async () => {
    const seen = new Map<string, number>();
    await fc.assert(
      fc.asyncProperty(cases(recorded), async (each) => {
        const outcome = await judge(each);
        seen.set(outcome, (seen.get(outcome) ?? 0) + 1);
      }),
      { numRuns: 2000 },
    );
    // The fuzzer reaches all of them, or it proves little.
    assert.deepEqual([...seen.keys()].sort(), ['malformed', 'tpm', 'value']);
  });
});
