import assert from 'node:assert/strict';
import { cpSync, readdirSync, readFileSync, rmSync, truncateSync } from 'node:fs';
import { dirname } from 'node:path';
import { readEnrolment } from 'vtpm-manager/enrolment';
import { startSwtpm } from '../support/swtpm.js';
import { until } from '../support/until.js';
import { crashingAt, type Guest, Host } from './platform-fixture.js';

interface Recovered {
  readonly isDone: boolean;
  readonly refusal?: string;
  readonly vtpms: readonly {
    readonly id: string;
    readonly generation: number;
    readonly nextGeneration: number;
    readonly lostAtLeast?: number;
  }[];
  readonly recoveryKey?: string;
  readonly needsAuthority: boolean;
}

/** Upper 32 bits of a generation: how often it went back. */
const jumps = (generation: bigint | number) => BigInt(generation) >> 32n;

describe('vtpm-managerd recover', () => {
  let host: Host;
  let guests: Guest[];
  beforeEach(async () => {
    host = await Host.create();
    await host.manager.start();
    await host.allowImage();
    guests = [await host.guest('A1'), await host.guest('B1')];
  });
  afterEach(() => host.destroy());

  async function recover(...args: string[]): Promise<Recovered> {
    const { code, stdout, stderr } = await host.manager.run('recover', ...args, '--json');
    assert.equal(code, 0, stderr);
    return JSON.parse(stdout) as Recovered;
  }

  async function refused(...args: string[]): Promise<string> {
    const { code, stderr } = await host.manager.run('recover', ...args, '--json');
    assert.equal(code, 1);
    return stderr;
  }

  const onlyStore = (disk: string) => {
    const { store } = host.manager.paths;
    rmSync(store, { recursive: true });
    cpSync(`${disk}/store`, store, { recursive: true });
  };

  /** An old store in a newer installation; the vTPMs have gone on meanwhile. */
  async function oldStore(): Promise<void> {
    await host.manager.stop();
    const disk = host.saveDisk();
    await host.manager.start();
    for (const guest of guests) {
      await host.resume(guest);
      await guest.session.save({ permanent: Buffer.from('newer') });
    }
    await host.manager.stop();
    onlyStore(disk);
  }

  async function checkVtpms(mark: string): Promise<void> {
    for (const [i, { vtpm }] of guests.entries()) {
      const view = await host.vtpm(vtpm.id);
      assert.deepEqual(view.marks, [mark]);
      const { permanent, generation } = await host.loaded(vtpm.id, BigInt(view.epoch as number));
      assert.equal(permanent, ['A1', 'B1'][i]);
      assert.ok(jumps(generation) >= 1n);
    }
  }

  function auditOf(action: string): { actor: unknown; verdict: string; vtpm?: string }[] {
    return readFileSync(host.manager.paths.audit, 'utf8')
      .trimEnd()
      .split('\n')
      .map((line) => JSON.parse(line) as { action: string; actor: unknown; verdict: string; vtpm?: string })
      .filter((entry) => entry.action === action);
  }

  it('has nothing to do where nothing is wrong, and does not run beside the manager', async () => {
    assert.match(await refused(), /\(in-use\)/);
    await host.manager.stop();
    const { isDone, refusal, recoveryKey } = await recover('--accept-rollback');
    assert.deepEqual([isDone, refusal, recoveryKey], [false, undefined, undefined]);
    assert.equal((await host.manager.start()).status, 'ready');
    assert.deepEqual((await host.vtpm(guests[0]!.vtpm.id)).marks, []);
  });

  it('says what an old store goes back to, and does nothing without the flag', async () => {
    await oldStore();
    await assert.rejects(host.manager.start(), /the store is an old one.*\(rollback-detected\)/s);
    const said = await recover();
    assert.equal(said.isDone, false);
    assert.match(String(said.refusal), /anchor says \d+, the TPM has counted to \d+/);
    assert.deepEqual(said.vtpms.map(({ id }) => id).sort(), guests.map(({ vtpm }) => vtpm.id).sort());
    for (const { generation, nextGeneration } of said.vtpms) {
      assert.equal(generation, 1);
      assert.equal(nextGeneration, undefined);
    }
    await assert.rejects(host.manager.start(), /\(rollback-detected\)/);
  });

  it('takes an old store with the flag: marked for ever, at generations that nobody had', async () => {
    await oldStore();
    const done = await recover('--accept-rollback');
    assert.equal(done.isDone, true);
    assert.equal((await host.manager.start()).status, 'ready');
    await checkVtpms('rolled-back');
    const entries = auditOf('accept-rollback');
    assert.equal(entries[0]?.verdict, 'intended');
    assert.deepEqual(
      entries
        .slice(1)
        .map(({ vtpm, verdict }) => `${vtpm} ${verdict}`)
        .sort(),
      guests.map(({ vtpm }) => `${vtpm.id} done`).sort(),
    );
    // The sessions of before are over: their workers have what is not there any more.
    await assert.rejects(host.resume(guests[0]!), /over/);
    // For ever: over saves, rotations and restarts.
    assert.equal((await host.post('/platform/rotations')).status, 200);
    await host.manager.stop();
    await host.manager.start();
    assert.deepEqual((await host.vtpm(guests[0]!.vtpm.id)).marks, ['rolled-back']);
    await host.manager.stop();
    await host.assertNothingLeft();
  });

  for (const [barrier, count] of [
    ['recover.spoilt', 1],
    ['recover.written', 1],
    ['recover.anchored', 1],
    ['recover.accepted', 1],
  ] as const) {
    it(`accepts again after a crash at ${barrier}`, async () => {
      await oldStore();
      const { signal } = await host.manager.runWith(
        crashingAt(barrier, count),
        'recover',
        '--accept-rollback',
      );
      assert.equal(signal, 'SIGKILL');
      // The anchor fits from then on, and the next start has the TPM count it.
      const isWhole = barrier === 'recover.anchored' || barrier === 'recover.accepted';
      if (!isWhole) await assert.rejects(host.manager.start(), /\(rollback-detected\)/);
      assert.equal((await recover('--accept-rollback')).isDone, !isWhole);
      assert.equal((await host.manager.start()).status, 'ready');
      await checkVtpms('rolled-back');
      await host.manager.stop();
      await host.assertNothingLeft();
    });
  }

  it('makes a new counter where the anchor of the TPM was removed', async () => {
    await host.manager.stop();
    const { handle } = readEnrolment(host.manager.paths).enrolment.tpm.anchor;
    await host.tools('tpm2_nvundefine', `0x${handle.toString(16)}`);
    await assert.rejects(host.manager.start(), /recover --accept-rollback.*\(anchor-removed\)/s);
    assert.match(String((await recover()).refusal), /counter is gone/);
    for (const barrier of ['recover.spoilt', 'recover.counter-made', 'recover.written']) {
      const { signal } = await host.manager.runWith(crashingAt(barrier), 'recover', '--accept-rollback');
      assert.equal(signal, 'SIGKILL', barrier);
      await assert.rejects(host.manager.start(), /\((anchor-removed|rollback-detected)\)/);
    }
    assert.equal((await recover('--accept-rollback')).isDone, true);
    assert.equal((await host.manager.start()).status, 'ready');
    await checkVtpms('rolled-back');
    await until('what the crashes left is removed', () => {
      return readEnrolment(host.manager.paths).enrolment.planned.length === 0;
    });
    await host.manager.stop();
    await host.assertNothingLeft();
  });

  it('names a cut audit log, and puts it aside', async () => {
    await host.manager.stop();
    const { audit } = host.manager.paths;
    const lines = readFileSync(audit, 'utf8').split('\n');
    truncateSync(audit, Buffer.byteLength(lines.slice(0, 2).join('\n')) + 1);
    await assert.rejects(host.manager.start(), /entry \d+ is missing.*\(audit-corrupt\)/s);
    assert.match(String((await recover()).refusal), /entry \d+ is missing/);
    assert.equal((await recover('--accept-rollback')).isDone, true);
    assert.ok(readdirSync(dirname(audit)).some((name) => name.startsWith('audit.log.aside-')));
    assert.equal((await host.manager.start()).status, 'ready');
    assert.match(JSON.stringify(auditOf('accept-rollback')[0]), /is missing/);
  });

  it('in the middle of a rotation', async () => {
    await host.manager.stop();
    await host.manager.start({ nodeArgs: crashingAt('rotation.rekeyed') });
    const { child } = host;
    await host.post('/platform/rotations').catch(() => undefined);
    await until('the manager is dead', () => child.signalCode === 'SIGKILL');
    const { handle } = readEnrolment(host.manager.paths).enrolment.tpm.anchor;
    await host.tools('tpm2_nvundefine', `0x${handle.toString(16)}`);
    assert.equal((await recover('--accept-rollback')).isDone, true);
    assert.equal((await host.manager.start()).status, 'ready');
    await checkVtpms('rolled-back');
    await until('the old generation is erased', () => {
      return readEnrolment(host.manager.paths).enrolment.erase.length === 0;
    });
    await host.manager.stop();
    await host.assertNothingLeft();
  });

  describe('with the recovery key', () => {
    let key: string;
    const otherChip = async () => {
      await host.manager.stop();
      await host.tpm.stop();
      host.tpm = await startSwtpm();
      return ['--tpm', `unix:${host.tpm.socket}`, '--accept-rollback'];
    };
    beforeEach(() => {
      key = host.file('recovery.key', `${host.recoveryKey}\n`);
    });

    it('goes over to a new TPM: everything loads, marked; the old key is void', async () => {
      await host.adopt();
      const [, at = '', accept = ''] = await otherChip();
      await assert.rejects(host.manager.start());
      const said = await recover('--recovery-key-file', key, '--tpm', at);
      assert.equal(said.isDone, false);
      assert.equal(said.recoveryKey, undefined);
      const { isDone, recoveryKey, needsAuthority } = await recover(
        ...['--recovery-key-file', key, '--tpm', at, accept],
      );
      assert.deepEqual([isDone, needsAuthority], [true, true]);
      assert.match(String(recoveryKey), /^vtpm-recovery-1-[0-9a-f]{64}$/);
      assert.equal((await host.manager.start()).status, 'ready');
      await checkVtpms('recovered');
      assert.equal((await host.view()).policy, 'fixed');
      assert.equal(auditOf('recover')[0]?.verdict, 'intended');
      await until('what names the old TPM is gone', () => {
        const { erase, planned } = readEnrolment(host.manager.paths).enrolment;
        return erase.length + planned.length === 0;
      });
      await host.manager.stop();
      await host.assertNothingLeft();
      assert.match(
        await refused('--recovery-key-file', key),
        /does not open with this key.*\(bad-request\)/s,
      );
      // The new one is good, and stays good over a rotation.
      await host.manager.start();
      assert.equal((await host.post('/platform/rotations')).status, 200);
      await host.manager.stop();
      const next = host.file('next.key', String(recoveryKey));
      assert.equal((await recover('--recovery-key-file', next, '--accept-rollback')).isDone, true);
      assert.equal((await host.manager.start()).status, 'ready');
    });

    it('refuses what is no recovery key, and another one, by name', async () => {
      await host.manager.stop();
      const wrong = host.file('wrong.key', `vtpm-recovery-1-${'00'.repeat(31)}01`);
      assert.match(await refused('--recovery-key-file', wrong), /does not open with this key/);
      const none = host.file('none.key', 'something else');
      assert.match(await refused('--recovery-key-file', none), /a recovery key is vtpm-recovery-1-/);
      assert.match(await refused('--tpm', 'embedded'), /go with --recovery-key-file/);
      assert.equal((await host.manager.start()).status, 'ready');
    });

    it('is repeated after a crash, and after a second one', async () => {
      const args = ['recover', '--recovery-key-file', key, ...(await otherChip())];
      for (const barrier of [
        'recover.made',
        'recover.enrolled',
        'recover.spoilt',
        'recover.written',
        // Records are under a generation that neither the old enrolment nor the next one is of.
        'recover.enrolled',
        'recover.written',
        'recover.anchored',
        'recover.accepted',
      ]) {
        const { signal, stderr } = await host.manager.runWith(crashingAt(barrier), ...args);
        assert.equal(signal, 'SIGKILL', `${barrier}: ${stderr}`);
        await assert.rejects(host.manager.start());
      }
      assert.equal((await recover(...args.slice(1))).isDone, true);
      assert.equal((await host.manager.start()).status, 'ready');
      await checkVtpms('recovered');
      await until('what the crashes left is removed', () => {
        const { erase, planned } = readEnrolment(host.manager.paths).enrolment;
        return erase.length + planned.length === 0;
      });
      await host.manager.stop();
      await host.assertNothingLeft();
    });
  });
});
