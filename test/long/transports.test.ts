import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Installation } from '../support/installation.js';
import { allToolsThrough, WAYS } from '../support/ways.js';

/** All ways; `npm test` goes those that are doors of their own. */
describe('more than forty tools, every way', () => {
  let installation: Installation;
  let work: string;

  before(async () => {
    work = mkdtempSync(join(tmpdir(), 'vtpm-ways-'));
    installation = await Installation.create({ tpm: 'embedded' });
    await installation.start();
  });
  after(async () => {
    await installation?.destroy();
    rmSync(work, { recursive: true, force: true });
  });

  for (const way of WAYS) {
    it(`work through ${way.name}`, () => allToolsThrough(way, installation, work));
  }
});
