import assert from 'node:assert/strict';
import { mkdirSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { identify, isAlive } from 'vtpm-toolstack/cli/process-table';
import { run } from '../support/installation.js';
import { type Swtpm, startSwtpm } from '../support/swtpm.js';
import { until } from '../support/until.js';
import { Desk } from './cli-fixture.js';

describe('vtpmctl init, up and down', () => {
  let desk: Desk;
  let tpm: Swtpm;
  beforeEach(async () => {
    desk = new Desk();
    tpm = await startSwtpm();
  });
  afterEach(async () => {
    await desk.ctl(['down']);
    await tpm.stop();
    await desk.clear();
  });

  const daemon = (name: 'manager' | 'supervisor') => {
    const [pid] = readFileSync(join(desk.paths.run, `${name}.pid`), 'utf8').split('\n');
    return identify(Number(pid));
  };
  const json = async (...args: string[]) => {
    const { code, stdout, stderr } = await desk.ctl(['--json', ...args]);
    assert.equal(code, 0, stderr);
    return JSON.parse(stdout) as Record<string, unknown>;
  };
  const init = () => json('init', '--tpm', `unix:${tpm.socket}`);

  it('init makes a counter in the RAM of the TPM where it is asked to', async () => {
    const orderlyCount = () =>
      (
        JSON.parse(readFileSync(desk.paths.manager.enrolment, 'utf8')) as {
          enrolment: { tpm: { anchor: { orderlyCount: number } } };
        }
      ).enrolment.tpm.anchor.orderlyCount;
    await json('init', '--tpm', `unix:${tpm.socket}`, '--orderly-counter');
    assert.ok(orderlyCount() > 0);
    await json('uninstall', '--yes');
    await init();
    assert.equal(orderlyCount(), 0);
  });

  it('goes from nothing to an answer of a vTPM and back to nothing running', async () => {
    const made = await init();
    assert.match(String(made.managerId), /^[0-9a-f]{64}$/);
    assert.equal(statSync(desk.paths.toolstack.key).mode & 0o777, 0o600);
    assert.equal(statSync(desk.paths.toolstack.key).size, 32);
    const kept = JSON.parse(readFileSync(desk.paths.toolstack.managerIdentity, 'utf8')) as typeof made;
    assert.equal(kept.managerId, made.managerId);

    const again = await desk.ctl(['init', '--tpm', `unix:${tpm.socket}`]);
    assert.equal(again.code, 1);
    assert.match(again.stderr, /initialised already/);

    assert.deepEqual((await json('up')).started, ['manager', 'supervisor']);
    const [manager, supervisor] = [daemon('manager'), daemon('supervisor')];
    assert.ok(manager && supervisor);
    const second = await desk.ctl(['up']);
    assert.equal(second.code, 0);
    assert.match(second.stdout, /running already/);
    assert.ok(isAlive(manager) && isAlive(supervisor));

    await json('create', 'web1');
    await json('start', 'web1');
    const random = await desk.ctl(['exec', 'web1', '--', 'tpm2_getrandom', '--hex', '8']);
    assert.match(random.stdout, /^[0-9a-f]{16}$/, random.stderr);
    const { worker, generation } = await json('show', 'web1');
    assert.ok((generation as number) >= 1);
    const process = identify((worker as { pid: number }).pid);
    assert.ok(process);

    assert.deepEqual((await json('down')).stopped, ['supervisor', 'manager']);
    for (const gone of [manager, supervisor, process]) assert.equal(isAlive(gone), false);
    assert.match((await desk.ctl(['down'])).stdout, /nothing was running/);
  });

  it('starts again only what is missing', async () => {
    await init();
    await json('up');
    const supervisor = daemon('supervisor');
    const manager = daemon('manager');
    assert.ok(manager && supervisor);
    process.kill(manager.pid, 'SIGKILL');
    await until('the manager is gone', () => !isAlive(manager));
    assert.deepEqual((await json('up')).started, ['manager']);
    assert.ok(isAlive(supervisor));
  });

  it('ends with 4 when the platform has changed, and leaves the manager up to help', async () => {
    await init();
    await json('up');
    await json('down');
    const extend = await run('tpm2_pcrextend', [`7:sha256=${'66'.repeat(32)}`], {
      TPM2TOOLS_TCTI: `swtpm:path=${tpm.socket}`,
    });
    assert.equal(extend.code, 0, extend.stderr);
    for (let attempt = 0; attempt < 2; attempt++) {
      const refused = await desk.ctl(['up']);
      assert.equal(refused.code, 4, refused.stderr);
      assert.match(refused.stderr, /the manager is locked: .*PCR/i);
    }
    assert.ok(daemon('manager'));
    assert.deepEqual((await json('down')).stopped, ['manager']);
  });

  it("gives the daemon's own reason when it does not start", async () => {
    await init();
    await tpm.kill();
    const refused = await desk.ctl(['up']);
    assert.equal(refused.code, 1);
    assert.match(refused.stderr, /the manager did not start: .*TPM/);
    assert.deepEqual((await json('down')).stopped, []);
  });

  it('never signals a process that only has the number of an old daemon', async () => {
    mkdirSync(desk.paths.run, { recursive: true });
    // This very test: had the start time not been compared, it would be the one to end.
    writeFileSync(join(desk.paths.run, 'manager.pid'), `${process.pid}\n1\n`);
    assert.deepEqual((await json('down')).stopped, []);
    assert.throws(() => statSync(join(desk.paths.run, 'manager.pid')));
  });

  it('does not stop daemons that something else started', async () => {
    await desk.manager({ 'GET /health': { body: { status: 'ready' } } });
    const { code, stderr } = await desk.ctl(['down']);
    assert.equal(code, 1);
    assert.match(stderr, /not started by vtpmctl up/);
  });

  it('makes the toolstack key once: a failed init does not replace it', async () => {
    const failed = await desk.ctl(['init', '--tpm', 'unix:/nowhere/tpm.sock']);
    assert.equal(failed.code, 1);
    const key = readFileSync(desk.paths.toolstack.key);
    await init();
    assert.deepEqual(readFileSync(desk.paths.toolstack.key), key);
  });
});
