import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { MUTANTS } from '../mutants/mutants.js';
import { mutate, Workshop } from '../mutants/workshop.js';
import { REPOSITORY } from '../support/installation.js';

describe('mutants', () => {
  it('each find their guard, and the test that stands for it', () => {
    for (const mutant of MUTANTS) {
      const source = readFileSync(join(REPOSITORY, mutant.file), 'utf8');
      assert.notEqual(mutate(source, mutant), source);
      const test = readFileSync(join(REPOSITORY, 'test', `${mutant.test.file}.test.ts`), 'utf8');
      assert.ok(test.includes(mutant.test.name), `${mutant.test.file} has no test "${mutant.test.name}"`);
    }
  });

  it('are noticed: a sample of what the long run does for all', function () {
    this.timeout(300_000);
    const workshop = new Workshop();
    try {
      const mutant = MUTANTS.find(({ name }) => name.startsWith('I-3 a Load'))!;
      const control = workshop.control(mutant);
      assert.ok(control.passes > 0 && control.failures === 0, control.output);
      assert.ok(workshop.try(mutant).failures > 0);
    } finally {
      workshop.close();
    }
  });
});
