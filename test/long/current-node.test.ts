import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { run } from '../support/installation.js';

/** The major version that is current beside the oldest supported one, which runs the other tests. */
const CURRENT = '24';

describe(`on Node.js ${CURRENT}`, () => {
  let directory: string;
  before(() => {
    directory = mkdtempSync(join(tmpdir(), 'vtpm-node-'));
  });
  after(() => rmSync(directory, { recursive: true, force: true }));

  it('every program and every test runs', async () => {
    const registry = { NODE_EXTRA_CA_CERTS: process.env.NODE_EXTRA_CA_CERTS };
    const install = [
      'install',
      '--ignore-scripts',
      '--prefix',
      directory,
      `node-linux-${process.arch}@${CURRENT}`,
    ];
    const installed = await run('npm', install, registry);
    assert.equal(installed.code, 0, `Node.js ${CURRENT} cannot be installed:\n${installed.stderr}`);
    const node = join(directory, `node_modules/node-linux-${process.arch}/bin/node`);
    assert.match((await run(node, ['--version'])).stdout, new RegExp(`^v${CURRENT}\\.`));
    // The programs start each other with the interpreter that they run on; the worker's image is made of it too.
    const tests = await run(node, [
      'node_modules/mocha/bin/mocha.js',
      ...['--reporter', 'dot', '--parallel', '--jobs', '2'],
      // It builds a copy of everything, which says nothing about the interpreter.
      ...['--ignore', 'test/dist/repository/**'],
    ]);
    assert.equal(tests.code, 0, tests.stdout.slice(-6000) + tests.stderr.slice(-2000));
  });
});
