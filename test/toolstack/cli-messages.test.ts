import assert from 'node:assert/strict';
import { mkdirSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { privateDirectory } from 'vtpm-common';
import { Desk, supervisorVtpm } from './cli-fixture.js';

const ID = '0b8f7a52-3c1d-4f0e-9a6b-2f3c4d5e6f70';

describe('vtpmctl: what it says to who makes a mistake', () => {
  let desk: Desk;
  beforeEach(() => {
    desk = new Desk();
  });
  afterEach(() => desk.clear());

  const refuse = async (args: readonly string[], code: number, text: RegExp): Promise<void> => {
    const finished = await desk.ctl(args);
    assert.equal(finished.code, code, finished.stderr);
    assert.match(finished.stderr, text);
  };

  it('begins every refusal with its name, and each is one line where nothing is to be shown', async () => {
    await refuse(['lst'], 2, /^vtpmctl: unknown command 'lst'/);
    await refuse(['create'], 2, /^vtpmctl: missing required argument 'name'/);
    await refuse(['init'], 2, /^vtpmctl: say which TPM: --tpm auto .*\n$/);
  });

  it('says that there is no installation where daemons cannot run yet', async () => {
    await refuse(['list'], 3, /is not running; start it: vtpmctl up \(.* is not initialised: .*--home\)/);
    mkdirSync(dirname(desk.paths.manager.enrolment), { recursive: true });
    writeFileSync(desk.paths.manager.enrolment, '{}');
    await refuse(['list'], 3, /start it: vtpmctl up\n$/);
  });

  it('refuses an empty --home: it would be the working directory', async () => {
    await refuse(['list', '--home', ''], 2, /--home is empty/);
    await refuse(['list', '--run-dir', ''], 2, /--run-dir is empty/);
  });

  it('tells a home that is no directory from a broken configuration file', async () => {
    const file = join(desk.directory, 'file');
    writeFileSync(file, '');
    await refuse(['list', '--home', file], 2, /file is not a directory; name another with --home/);
  });

  it('ends where a file system takes no directories', async () => {
    await refuse(['init', '--tpm', 'embedded', '--home', '/proc/vtpm'], 1, /\/proc\/vtpm/);
  });

  it('finds out what is wrong with flags of init before anything is made', async () => {
    const missing = join(desk.directory, 'missing');
    await refuse(
      ['init', '--tpm', 'embedded', '--owner-auth-file', missing],
      2,
      /--owner-auth-file: .*missing/,
    );
    assert.throws(() => writeFileSync(join(desk.paths.home, 'x'), ''), /ENOENT/);
    await refuse(['init', '--tpm', 'embedded', '--pcrs', 'seven'], 2, /"seven" is no PCR selection/);
  });

  it('names the vTPM in the next step', async () => {
    const body = { error: { code: 'already-running', message: 'vTPM web1 is running already' } };
    await desk.supervisor({ 'POST /vtpms/web1/start': { status: 409, body } });
    await refuse(['start', 'web1'], 1, /; vtpmctl show web1 shows its sockets/);
  });

  it('says of a crashed vTPM that its VM must be powered off', async () => {
    const vtpm = supervisorVtpm(ID, 'web1', { state: 'crashed', reason: 'killed', epoch: 1 });
    await desk.supervisor({ 'GET /vtpms/web1': { body: vtpm } });
    await refuse(
      ['exec', 'web1', '--', 'true'],
      3,
      /web1 has crashed; power its VM off, then: vtpmctl start web1/,
    );
    const shown = await desk.ctl(['show', 'web1']);
    assert.match(shown.stdout, /killed; power its VM off/);
  });

  it('tells programs that are not there from files that are no programs', async () => {
    const vtpm = supervisorVtpm(ID, 'web1', { state: 'running', epoch: 1 });
    await desk.supervisor({ 'GET /vtpms/web1': { body: vtpm } });
    const file = join(desk.directory, 'file');
    writeFileSync(file, '', { mode: 0o600 });
    await refuse(['exec', 'web1', '--', file], 1, /file" is not an executable file/);
  });

  it('says that there are no logs yet', async () => {
    const { code, stdout, stderr } = await desk.ctl(['logs']);
    assert.deepEqual([code, stdout], [0, '']);
    assert.match(stderr, /no logs in .*vtpmctl up/);
  });

  it('up says itself that a path is too long', async () => {
    const home = join(desk.directory, 'd'.repeat(100));
    mkdirSync(join(home, 'manager'), { recursive: true });
    writeFileSync(join(home, 'manager', 'enrolment.json'), '{}');
    await refuse(['up', '--home', home], 2, /choose a shorter --home or --run-dir/);
  });
});

describe('common: private directories', () => {
  it('makes what is missing, keeps what is there, and gives the reason where it cannot', () => {
    const desk = new Desk();
    try {
      const deep = join(desk.directory, 'a', 'b');
      assert.equal(privateDirectory(deep), deep);
      assert.equal(privateDirectory(deep), deep);
      writeFileSync(join(deep, 'file'), '');
      assert.throws(() => privateDirectory(join(deep, 'file')), /EEXIST/);
      assert.throws(() => privateDirectory(join(deep, 'file', 'c')), /EEXIST|ENOTDIR/);
    } finally {
      void desk.clear();
    }
  });
});
