import assert from 'node:assert/strict';
import { readdirSync, readFileSync, readlinkSync } from 'node:fs';
import { join } from 'node:path';
import { Installation, REPOSITORY, run } from '../support/installation.js';

/** Node's debugger is a TCP socket in state LISTEN (0A). */
function listensOnTcp(pid: number): boolean {
  const table = ['tcp', 'tcp6'].flatMap((name) =>
    readFileSync(`/proc/${pid}/net/${name}`, 'utf8').split('\n'),
  );
  const rows = table.map((line) => line.trim().split(/\s+/));
  const inodes = new Set(
    rows.filter((fields) => fields[3] === '0A').map((fields) => `socket:[${fields[9]}]`),
  );
  return readdirSync(`/proc/${pid}/fd`).some((fd) => {
    try {
      return inodes.has(readlinkSync(`/proc/${pid}/fd/${fd}`));
    } catch {
      return false;
    }
  });
}

/** The embedded TPM of a manager: its only child that is one. */
function softTpmOf(manager: number): number {
  const children = readFileSync(`/proc/${manager}/task/${manager}/children`, 'utf8')
    .trim()
    .split(' ')
    .map(Number);
  return children.find((pid) => readFileSync(`/proc/${pid}/cmdline`, 'utf8').includes('vtpm-softtpm')) ?? -1;
}

describe('I-7 processes that hold keys', function () {
  this.timeout(60_000);

  it('open no debugger when they are sent SIGUSR1', async () => {
    const installation = await Installation.create({ tpm: 'embedded' });
    try {
      await installation.start();
      const manager = installation.manager?.pid ?? -1;
      const supervisor = installation.supervisor?.pid ?? -1;
      for (const pid of [manager, supervisor, softTpmOf(manager)]) {
        process.kill(pid, 'SIGUSR1');
        // Each handles it before it answers a second time.
        for (let turn = 0; turn < 3; turn++) {
          await installation.admin('GET', '/health');
          await installation.supervisord('GET', '/health');
        }
        assert.equal(listensOnTcp(pid), false, installation.logs());
      }
      assert.doesNotMatch(installation.logs(), /Debugger listening/);
    } finally {
      await installation.destroy();
    }
  });

  it('forbid their core dumps before they read a key', async () => {
    for (const program of ['manager/bin/vtpm-managerd.js', 'toolstack/bin/vtpm-supervisord.js']) {
      const args = ['-f', '-e', 'trace=prctl', process.execPath, join(REPOSITORY, program), '--version'];
      const { stderr } = await run('strace', args);
      assert.match(stderr, /prctl\(PR_SET_DUMPABLE, (SUID_DUMP_DISABLE|0)/, program);
    }
  });
});
