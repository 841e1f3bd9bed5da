import assert from 'node:assert/strict';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import * as commands from 'tpm2-ts-bindings/internal/commands/index';
import { REPOSITORY, run } from '../support/installation.js';

/** Tests whose sockets have swtpm at the other end, and nothing that makes answers up. */
const FILES = [
  ...['attest', 'audit', 'commands', 'hierarchy', 'migration', 'nv', 'objects', 'policy', 'primitives'],
  ...['refusals', 'session'],
];

describe('tpm2-ts-bindings: every command', () => {
  it('was answered by swtpm with success, and with a refusal', async () => {
    const directory = mkdtempSync(join(tmpdir(), 'vtpm-census-'));
    try {
      const census = join(directory, 'census.json');
      const tests = join(REPOSITORY, 'test/dist/tpm2-ts-bindings');
      const { code, stdout, stderr } = await run(
        process.execPath,
        [
          join(REPOSITORY, 'node_modules/mocha/bin/mocha.js'),
          ...['--no-config', '--exit', '--timeout', '60000', '--require', join(tests, 'census.js')],
          ...FILES.map((name) => join(tests, `${name}.test.js`)),
        ],
        { CENSUS: census },
      );
      assert.equal(code, 0, stdout + stderr);
      const seen = JSON.parse(readFileSync(census, 'utf8')) as [command: number, response: number][];
      const missing = Object.values(commands).flatMap(({ name, code: own }) => {
        const answers = seen.filter(([command]) => command === own).map(([, response]) => response);
        return [
          ...(answers.includes(0) ? [] : [`${name}: no success`]),
          ...(answers.some((response) => response !== 0) ? [] : [`${name}: no refusal`]),
        ];
      });
      assert.deepEqual(missing, []);
    } finally {
      rmSync(directory, { recursive: true, force: true });
    }
  });
});
