import assert from 'node:assert/strict';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { checkSocketPath, loadConfiguration, pathsOf } from 'vtpm-common';

describe('the configuration', () => {
  let home: string;
  beforeEach(() => {
    home = mkdtempSync(join(tmpdir(), 'vtpm-config-'));
  });
  afterEach(() => rmSync(home, { recursive: true }));
  const write = (text: string) => writeFileSync(join(home, 'config.json'), text);

  it('takes a flag over the environment over the file over the default', () => {
    const level = (flags: object, env: object) =>
      loadConfiguration({ home, ...flags }, { ...env }).settings['log-level'];
    assert.equal(level({}, {}), 'info');
    write('{"log-level": "warn"}');
    assert.equal(level({}, {}), 'warn');
    assert.equal(level({}, { VTPM_LOG_LEVEL: 'error' }), 'error');
    assert.equal(level({ 'log-level': 'debug' }, { VTPM_LOG_LEVEL: 'error' }), 'debug');
    assert.equal(
      loadConfiguration({ home }, { VTPM_LOG_LEVEL: 'error' }).sources['log-level'],
      'environment',
    );
  });

  it('refuses an unknown key by name and lists the known ones', () => {
    write('{"log-lvl": "warn"}');
    assert.throws(
      () => loadConfiguration({ home }, {}),
      /config\.json: unknown key "log-lvl"; the keys are run-dir, log-level/,
    );
  });

  it('refuses what is not JSON, not an object, or out of range, naming where it stands', () => {
    write('{');
    assert.throws(() => loadConfiguration({ home }, {}), /config\.json is not JSON/);
    write('[]');
    assert.throws(() => loadConfiguration({ home }, {}), /must hold one JSON object/);
    write('{}');
    assert.throws(
      () => loadConfiguration({ home, 'ticket-lifetime': '1' }, {}),
      /--ticket-lifetime is a whole number from 5 to 3600/,
    );
    assert.throws(
      () => loadConfiguration({ home }, { VTPM_ISOLATION: 'jail' }),
      /VTPM_ISOLATION is one of sandbox, vm, none, not "jail"/,
    );
  });
});

describe('paths', () => {
  it('keep two installations apart', () => {
    assert.notEqual(pathsOf('/a').manager.workerSocket, pathsOf('/b').manager.workerSocket);
    assert.equal(pathsOf('/a').run, '/a/run');
    assert.equal(pathsOf('/a', '/r').supervisor.socket, '/r/supervisor.sock');
  });

  it('say what to do where a socket path is too long for the kernel', () => {
    assert.throws(
      () => checkSocketPath(`/${'x'.repeat(107)}`),
      /has 108 bytes, a unix socket takes 107; choose a shorter --home or --run-dir/,
    );
    checkSocketPath(`/${'x'.repeat(106)}`);
  });
});
