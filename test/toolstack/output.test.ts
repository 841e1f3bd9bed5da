import assert from 'node:assert/strict';
import { createOutput, printable } from 'vtpm-toolstack/cli/output';

describe('what vtpmctl prints', () => {
  it('shows control characters and does not send them to the terminal', () => {
    assert.equal(printable('a\x1b[2Jb\x07\x7f\x9bc'), 'a\\x1b[2Jb\\x07\\x7f\\x9bc');
    let written = '';
    const stream = {
      write(text: unknown) {
        written += String(text);
        return true;
      },
    };
    const output = createOutput(false, stream, stream);
    output.result({}, 'worker said \x1b]0;owned\x07');
    output.note('\x1bc');
    assert.equal(written, 'worker said \\x1b]0;owned\\x07\n\\x1bc\n');
  });

  it('keeps lines, tabs and letters of any script', () => {
    assert.equal(printable('one\n\ttwo  größe 東京'), 'one\n\ttwo  größe 東京');
  });
});
