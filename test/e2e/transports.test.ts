import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Installation } from '../support/installation.js';
import { TOOL_LINES } from '../support/tool-lines.js';
import { allToolsThrough, WAYS } from '../support/ways.js';

/** The ways that are doors of their own; the long run goes all of them. */
describe('more than forty tools', () => {
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

  it('are more than forty', () => {
    const tools = new Set(TOOL_LINES.map((line) => line.split(' ')[0]));
    assert.ok(tools.size >= 40, `${tools.size}`);
  });

  for (const way of WAYS.filter(({ isDoor }) => isDoor)) {
    it(`work through ${way.name}`, () => allToolsThrough(way, installation, work));
  }
});
