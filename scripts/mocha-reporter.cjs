// mocha's spec reporter, which also writes the counts where `.ci/run` reads them.
const { writeFileSync } = require('node:fs');
const Mocha = require('mocha');

module.exports = class extends Mocha.reporters.Spec {
  constructor(runner, options) {
    super(runner, options);
    runner.once(Mocha.Runner.constants.EVENT_RUN_END, () => {
      const { passes, failures, pending, duration } = runner.stats;
      const file = process.env.VTPM_TEST_REPORT;
      if (file) writeFileSync(file, JSON.stringify({ passes, failures, pending, duration }));
    });
  }
};
