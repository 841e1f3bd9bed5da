import assert from 'node:assert/strict';
import { MUTANTS } from '../mutants/mutants.js';
import { Workshop } from '../mutants/workshop.js';

/** Each guard is removed from a copy of the project; the test that stands for it must notice. */
describe('without a guard its test fails:', () => {
  let workshop: Workshop;
  before(() => {
    workshop = new Workshop();
  });
  after(() => workshop?.close());

  for (const mutant of MUTANTS) {
    it(mutant.name, () => {
      const control = workshop.control(mutant);
      assert.ok(control.passes > 0 && control.failures === 0, `with the guard:\n${control.output}`);
      const verdict = workshop.try(mutant);
      assert.ok(verdict.failures > 0, `survived in ${mutant.file}:\n${verdict.output}`);
    });
  }
});
