import assert from 'node:assert/strict';
import { TOOL_LINES } from '../support/tool-lines.js';
import { itWorksThrough, WAYS } from '../support/ways.js';

/** The ways that are doors of their own; the long run goes all of them. */
describe('more than forty tools', () => {
  it('are more than forty', () => {
    const tools = new Set(TOOL_LINES.map((line) => line.split(' ')[0]));
    assert.ok(tools.size >= 40, `${tools.size}`);
  });

  itWorksThrough(WAYS.filter(({ isDoor }) => isDoor));
});
