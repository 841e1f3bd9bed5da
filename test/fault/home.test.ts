import assert from 'node:assert/strict';
import { cpSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { connectGuest, type Guest } from 'vtpm-quickstart/guest';
import { type Finished, Installation, REPOSITORY, run } from '../support/installation.js';

const MANAGER = 'manager/bin/vtpm-managerd.js';
const SUPERVISOR = 'toolstack/bin/vtpm-supervisord.js';

describe('I-10 a home that is not as it should be', function () {
  this.timeout(120_000);
  let installation: Installation;
  let neighbour: Installation;
  let guest: Guest;
  let served: bigint;

  before(async () => {
    neighbour = await Installation.create({ tpm: 'embedded' });
    await neighbour.start();
    guest = await connectGuest(await neighbour.vtpm('web1'));
    await guest.defineCounter();
    installation = await Installation.create({ homeDisk: '400m' });
  });
  beforeEach(async () => {
    served = await guest.counter();
  });
  // The neighbour is another installation on the same host.
  afterEach(async () => {
    await guest.increment();
    assert.equal(await guest.counter(), served + 1n, 'the neighbour is served throughout');
  });
  after(async () => {
    await guest?.close();
    await installation?.destroy();
    await neighbour?.destroy();
  });

  /** A program on the installation, to its end. */
  const program = (script: string, ...args: string[]): Promise<Finished> =>
    run(process.execPath, [join(REPOSITORY, script), '--home', installation.home, ...args]);

  async function startsAndStops(): Promise<void> {
    assert.equal((await installation.startManager()).body.status, 'ready');
    await installation.startSupervisor();
    await installation.stopDaemons();
  }

  it('I-10 read-only: both daemons and vtpmctl end by name and change nothing', async () => {
    installation.disk?.writable(false);
    try {
      for (const [script, code] of [
        [MANAGER, '(home-unwritable)'],
        [SUPERVISOR, '[home-unwritable]'],
      ] as const) {
        const { code: status, stderr } = await program(script);
        assert.equal(status, 1, stderr);
        assert.ok(stderr.includes(code), stderr);
        assert.match(stderr, /cannot be written .*: mount it writable/);
        assert.doesNotMatch(stderr, /\n\s+at /, 'no stack trace for what the operator can mend');
      }
      const up = await installation.ctl('up');
      assert.notEqual(up.code, 0);
      assert.match(up.stderr, /read-only|cannot be written/);
      assert.doesNotMatch(up.stderr, /\n\s+at /);
    } finally {
      installation.disk?.writable(true);
    }
    await startsAndStops();
  });

  it('I-9 I-10 emptied under an enrolled TPM: no start begins anew; init does, and says what is left in the TPM', async () => {
    const aside = mkdtempSync(join(tmpdir(), 'vtpm-aside-'));
    const { home } = installation;
    try {
      cpSync(home, aside, { recursive: true, preserveTimestamps: true });
      for (const name of readdirSync(home)) rmSync(join(home, name), { recursive: true });
      const manager = await program(MANAGER);
      assert.equal(manager.code, 1);
      assert.match(manager.stderr, /is not initialised; run: vtpmctl init.*\(not-initialised\)/);
      const up = await installation.ctl('up');
      assert.notEqual(up.code, 0);
      assert.match(up.stderr, /not-initialised|not initialised/);
      assert.deepEqual(
        readdirSync(home).filter((name) => name === 'manager'),
        [],
        'nothing was made',
      );

      const init = await installation.ctl('init', '--tpm', `unix:${installation.tpm?.socket}`);
      assert.equal(init.code, 0, init.stderr);
      assert.match(
        init.stdout + init.stderr,
        /the TPM holds NV indices of other installations \(0x0181[0-9a-f]{4}(, 0x0181[0-9a-f]{4}){2}\)/,
      );
      await startsAndStops();
      // Positive control: the TPM has kept what the emptied home was enrolled with.
      for (const name of readdirSync(home)) rmSync(join(home, name), { recursive: true });
      cpSync(aside, home, { recursive: true });
      await startsAndStops();
    } finally {
      rmSync(aside, { recursive: true });
    }
  });

  it('I-10 an unknown key or a bad value in config.json: every program names it', async () => {
    const path = join(installation.home, 'config.json');
    try {
      for (const [content, said] of [
        ['{"colour": "red"}', /unknown key "colour"; the keys are .*store-reserve/],
        ['{"store-reserve": -1}', /"store-reserve" is a whole number from 0 to/],
        ['{"log-level": "info"', /is not JSON/],
      ] as const) {
        writeFileSync(path, content);
        for (const script of [MANAGER, SUPERVISOR, 'toolstack/bin/vtpmctl.js']) {
          const args = script.endsWith('vtpmctl.js') ? ['list'] : [];
          const { code, stderr } = await program(script, ...args);
          assert.notEqual(code, 0);
          assert.match(stderr, said, script);
          assert.doesNotMatch(stderr, /\n\s+at /);
        }
      }
      writeFileSync(path, '{"store-reserve": 1}');
      await startsAndStops();
    } finally {
      rmSync(path, { force: true });
    }
  });

  it('I-10 a socket path that is too long: named, with what to do', async () => {
    const long = join(installation.home, 'x'.repeat(90));
    for (const script of [MANAGER, SUPERVISOR]) {
      const { code, stderr } = await program(script, '--run-dir', long);
      assert.notEqual(code, 0);
      assert.match(stderr, /has \d+ bytes, a unix socket takes 107; choose a shorter --home or --run-dir/);
      assert.doesNotMatch(stderr, /\n\s+at /, script);
    }
    rmSync(long, { recursive: true, force: true });
    await startsAndStops();
  });

  it('I-10 two managers and two supervisors on one home: the second ends by name, the first serves on', async () => {
    await installation.start();
    const own = await connectGuest(await installation.vtpm('web1'));
    await own.defineCounter();
    const count = await own.counter();
    const pid = await installation.workerPid('web1');
    const manager = await program(MANAGER);
    assert.equal(manager.code, 1);
    assert.match(manager.stderr, /another vtpm-managerd runs on .*\(in-use\)/);
    const supervisor = await program(SUPERVISOR);
    assert.equal(supervisor.code, 1);
    assert.match(supervisor.stderr, /another vtpm-supervisord holds .*\[in-use\]/);
    await own.increment();
    assert.equal(await own.counter(), count + 1n);
    assert.equal(await installation.workerPid('web1'), pid);
    await own.close();
    await installation.stopDaemons();
    await startsAndStops();
  });
});
