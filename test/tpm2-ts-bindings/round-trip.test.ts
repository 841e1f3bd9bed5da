import assert from 'node:assert/strict';
import fc from 'fast-check';
import { type Codec, concat, decode, encode, TpmError } from 'tpm2-ts-bindings';
import { isA } from '../support/is-a.js';
import { COMMANDS, fieldsOf, MUTATION, STRUCTURES, valuesOf } from './arbitrary.js';
import { has } from './make.js';

const RUNS = 40;

/** A value comes back as it was; nothing can be missing or too much. */
function survives(codec: Codec<unknown>, values: fc.Arbitrary<unknown>): void {
  fc.assert(
    fc.property(values, (value) => {
      const bytes = encode(codec, value);
      assert.deepEqual(decode(codec, bytes), value);
      assert.throws(() => decode(codec, concat(bytes, Buffer.of(0))), has('malformed'));
      if (bytes.length > 0) assert.throws(() => decode(codec, bytes.subarray(0, -1)), has('malformed'));
    }),
    { numRuns: RUNS },
  );
}

/**
 * What is read at all is written as the same bytes. One exception, by design: a PCR selection is written with three
 * bytes of bit map, and may come with another number of them (Part 2, 10.6.2: sizeofSelect). Then it still reads as
 * the same selection, or names a register that no command of ours is sent with.
 */
function isCanonical(codec: Codec<unknown>, values: fc.Arbitrary<unknown>): void {
  fc.assert(
    fc.property(values, MUTATION, (valid, mutate) => {
      const bytes = mutate(encode(codec, valid));
      const value = attempt('malformed', () => decode(codec, bytes));
      if (value === undefined) return;
      const again = attempt('usage', () => encode(codec, value));
      if (again?.equals(bytes)) return;
      assert.ok(holdsSelection(value), `${bytes.toString('hex')} became ${again?.toString('hex')}`);
      if (again !== undefined) assert.deepEqual(decode(codec, again), value);
    }),
    { numRuns: RUNS },
  );
}

/** undefined where it throws a TpmError of that code; any other exception passes. */
function attempt<T>(code: TpmError['code'], body: () => T): T | undefined {
  try {
    return body();
  } catch (error) {
    if (isA(error, TpmError) && error.code === code) return undefined;
    throw error;
  }
}

/** True where a PCR selection is somewhere in the value. */
function holdsSelection(value: unknown): boolean {
  if (typeof value !== 'object' || value === null || Buffer.isBuffer(value)) return false;
  return 'pcrs' in value || Object.values(value).some(holdsSelection);
}

describe('tpm2-ts-bindings: every format', () => {
  it('is enumerated', () => {
    assert.ok(STRUCTURES.length >= 27, `${STRUCTURES.length} structures`);
    assert.ok(COMMANDS.length >= 80, `${COMMANDS.length} commands`);
    assert.equal(new Set(COMMANDS.map(({ code }) => code)).size, COMMANDS.length, 'one code, one command');
  });

  for (const [name, codec] of STRUCTURES) {
    it(`${name} survives`, () => survives(codec, valuesOf(name, codec)));
    it(`${name} is canonical`, () => isCanonical(codec, valuesOf(name, codec)));
  }

  for (const command of COMMANDS) {
    it(`TPM2_${command.name}: parameters and result survive and are canonical`, () => {
      for (const which of ['params', 'result'] as const) {
        const codec = command[which] as Codec<unknown>;
        const values = fieldsOf(command, which);
        survives(codec, values);
        isCanonical(codec, values);
      }
    });
  }
});
