import { Installation } from '../support/installation.js';
import { liveThroughOutage } from '../support/outage.js';

describe('I-8 the manager is away for a minute', () => {
  let installation: Installation;
  before(async () => {
    installation = await Installation.create();
    await installation.start();
    await installation.vtpm('web1');
  });
  after(() => installation?.destroy());

  it('a raw client and tpm2-tools read, extend and increment, and nothing is lost', () =>
    liveThroughOutage(installation, 'web1', 60));
});
