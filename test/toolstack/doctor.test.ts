import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { chmodSync, existsSync, mkdirSync, mkdtempSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import {
  EvictControl,
  Ht,
  listHandles,
  NV_UndefineSpace,
  permanent,
  Rh,
  readNvIndex,
  readObject,
  type Tpm,
  withPassword,
} from 'tpm2-ts-bindings';
import type { Finding, FindingLevel } from 'vtpm-common';
import { coverageOf, judgeCoverage } from 'vtpm-manager/doctor/pcr-coverage';
import { type Expectation, judgeTpm } from 'vtpm-manager/doctor/tpm-findings';
import type { TpmFacts } from 'vtpm-manager/root-tpm/examine';
import { checkSaved } from 'vtpm-toolstack/cli/doctor/daemons';
import { checkKernel, checkSandbox, checkSwap } from 'vtpm-toolstack/cli/doctor/host';
import { identify } from 'vtpm-toolstack/cli/process-table';
import { end, type Finished, Installation, REPOSITORY, run } from '../support/installation.js';
import { commandCode, startRecordingProxy } from '../support/recording-proxy.js';
import { type Swtpm, startSwtpm } from '../support/swtpm.js';
import { connectTpm } from '../support/tpm-fixture.js';

interface Visit {
  readonly code: number | null;
  readonly findings: Finding[];
  level(check: string): FindingLevel | undefined;
  get(check: string): Finding;
}

function visit({ code, stdout, stderr }: Finished): Visit {
  assert.match(stdout, /^\{/, stderr);
  const { findings } = JSON.parse(stdout) as { findings: Finding[] };
  // Of several findings of one check the worst.
  const order = ['ok', 'note', 'warning', 'problem'];
  const worst = (check: string) =>
    findings
      .filter((found) => found.check === check)
      .sort((a, b) => order.indexOf(b.level) - order.indexOf(a.level))[0];
  assert.equal(code, findings.some(({ level }) => level === 'problem') ? 1 : 0);
  for (const { level, message, fix } of findings) {
    assert.doesNotMatch(message, /\.$/);
    if (level === 'problem' || level === 'warning') assert.ok(fix, `${message} has no command`);
  }
  return {
    code,
    findings,
    level: (check) => worst(check)?.level,
    get: (check) => {
      const found = worst(check);
      assert.ok(found, `no finding ${check}`);
      return found;
    },
  };
}

const vtpmctl = (home: string, args: string[], env: NodeJS.ProcessEnv = {}) =>
  run(process.execPath, [join(REPOSITORY, 'toolstack/bin/vtpmctl.js'), '--home', home, ...args], env);

async function withTpm<T>(chip: Swtpm | undefined, body: (tpm: Tpm) => Promise<T>): Promise<T> {
  assert.ok(chip);
  const tpm = await connectTpm(chip.socket);
  try {
    return await body(tpm);
  } finally {
    await tpm.close();
  }
}

describe('vtpmctl doctor before init', function () {
  this.timeout(120_000);
  let chip: Swtpm;
  let directory: string;
  before(async () => {
    chip = await startSwtpm();
    directory = mkdtempSync(join(tmpdir(), 'vtpm-doctor-'));
  });
  after(async () => {
    await chip.stop();
    rmSync(directory, { recursive: true, force: true });
  });
  const home = () => join(directory, 'h');
  const doctor = async (args: string[] = [], env: NodeJS.ProcessEnv = {}) =>
    visit(await vtpmctl(home(), ['doctor', '--json', '--tpm', `unix:${chip.socket}`, ...args], env));

  it('finds packages, kernel, sandbox and TPM in order, and makes nothing', async () => {
    const found = await doctor();
    for (const check of [
      'package-node',
      'package-bwrap',
      'package-libtpms',
      'package-programs',
      'kernel-userns',
      'kernel-seccomp',
      'sandbox',
      'tpm-access',
      'tpm',
      'tpm-fitness',
      'tpm-pcr-bank',
      'tpm-lockout',
      'tpm-srk',
      'disk',
    ]) {
      assert.equal(found.level(check), 'ok', JSON.stringify(found.get(check)));
    }
    assert.match(found.get('tpm').message, /IBM, firmware/);
    assert.match(found.get('tpm-srk').message, /init makes one/);
    assert.equal(found.level('tpm-hardware'), 'warning');
    assert.match(found.get('installation').fix ?? '', /vtpmctl init/);
    assert.equal(existsSync(home()), false);
  });

  it('sends the TPM commands that read and no others', async () => {
    const proxy = await startRecordingProxy(chip.socket);
    try {
      visit(await vtpmctl(home(), ['doctor', '--json', '--tpm', `unix:${proxy.path}`]));
      const codes = new Set(proxy.commands.map(commandCode));
      assert.ok(codes.size > 0);
      // GetCapability, PCR_Read, ReadPublic, NV_ReadPublic.
      const reading = new Set([0x17a, 0x17e, 0x173, 0x169]);
      assert.deepEqual(
        [...codes].filter((code) => !reading.has(code)),
        [],
      );
    } finally {
      await proxy.close();
    }
  });

  it('says so of a TPM that is not there, and of one that never answers', async () => {
    const absent = visit(await vtpmctl(home(), ['doctor', '--json', '--tpm', `device:${directory}/tpmrm0`]));
    assert.equal(absent.level('tpm-access'), 'problem');
    assert.match(absent.get('tpm-access').message, /no TPM device/);
    // The other client has swtpm for itself.
    const holder = await connectTpm(chip.socket);
    try {
      await listHandles(holder, Ht.PERSISTENT);
      const busy = await doctor([], { VTPM_TPM_DEADLINE: '2' });
      assert.equal(busy.level('tpm'), 'problem');
      assert.match(busy.get('tpm').fix ?? '', /fuser/);
    } finally {
      await holder.close();
    }
    assert.equal((await doctor()).level('tpm'), 'ok');
  });

  it('judges PCRs: those that nobody measured into, and those that cover more', async () => {
    assert.match((await doctor()).get('pcr-coverage').message, /nothing was measured into sha256:7/);
    const { code, stderr } = await run(
      'tpm2_pcrextend',
      [0, 4, 7, 9].map((pcr) => `${pcr}:sha256=${'ab'.repeat(32)}`),
      { TPM2TOOLS_TCTI: `swtpm:path=${chip.socket}` },
    );
    assert.equal(code, 0, stderr);
    const seven = (await doctor()).get('pcr-coverage');
    assert.match(
      seven.message,
      /covers none of the firmware, the boot loader, the kernel command line, the initrd/,
    );
    assert.match(seven.fix ?? '', /--pcrs sha256:0,4,7,9$/);
    const more = (await doctor(['--pcrs', 'sha256:0,4,7,9'])).get('pcr-coverage');
    assert.match(
      more.message,
      /covers the firmware, the boot loader, the initrd, but not the kernel command line/,
    );
    assert.equal(more.fix, null);
    assert.match((await doctor(['--pcrs', 'sha256:7,12'])).get('pcr-empty').message, /PCR 12/);
  });

  it('finds a sandbox that cannot be made', async () => {
    const bin = join(directory, 'bin');
    mkdirSync(bin);
    writeFileSync(
      join(bin, 'bwrap'),
      '#!/bin/sh\necho "bwrap: Can\'t mount proc on /newroot/proc: Operation not permitted" >&2\nexit 1\n',
    );
    chmodSync(join(bin, 'bwrap'), 0o755);
    const found = await doctor([], { PATH: `${bin}:${process.env.PATH}` });
    assert.match(found.get('sandbox').message, /cannot be made: .*mount proc/);
    assert.match(found.get('sandbox').fix ?? '', /container/);
    // One that starts the program without confining it is no sandbox.
    writeFileSync(join(bin, 'bwrap'), '#!/bin/sh\nexec cat /proc/self/status\n');
    assert.match(checkSandbox(bin).message, /does not take privileges away/);
    assert.equal(checkSandbox().level, 'ok');
  });

  it('ends with 2 on flags that are wrong', async () => {
    assert.equal(
      (await vtpmctl(home(), ['doctor', '--pcrs', 'magic', '--tpm', `unix:${chip.socket}`])).code,
      2,
    );
    assert.equal((await vtpmctl(home(), ['doctor', '--tpm', 'magic'])).code, 2);
  });
});

describe('vtpmctl doctor on an installation', function () {
  this.timeout(180_000);
  let installation: Installation;
  before(async () => {
    installation = await Installation.create();
  });
  after(() => installation?.destroy());
  const doctor = async () => visit(await installation.ctl('doctor', '--json'));

  it('finds the same of the TPM with the manager stopped and running, and nothing wrong', async () => {
    const ofTpm = ({ findings }: Visit) =>
      findings
        .filter(({ check }) => check.startsWith('tpm') || check.startsWith('pcr'))
        .filter(({ check }) => check !== 'tpm-access');
    const stopped = await doctor();
    assert.equal(stopped.code, 0, JSON.stringify(stopped.findings));
    assert.equal(stopped.get('manager-runs').fix, 'vtpmctl up');
    assert.equal(stopped.level('tpm-nv'), 'ok');
    await installation.start();
    const running = await doctor();
    assert.equal(running.code, 0);
    assert.deepEqual(ofTpm(running), ofTpm(stopped));
    for (const check of [
      'manager-runs',
      'supervisor-runs',
      'manager-version',
      'worker-image',
      'libtpms-fit',
      'file-modes',
    ]) {
      assert.equal(running.level(check), 'ok', JSON.stringify(running.get(check)));
    }
    assert.match((await installation.ctl('doctor')).stdout, /^ok {7}Node\.js[\s\S]*0 problems/);
  });

  it('finds a worker image that is not allowed', async () => {
    const { digest } = (await installation.supervisord('GET', '/image')).body as { digest: string };
    await installation.admin('DELETE', `/images/${digest}`);
    assert.match((await doctor()).get('worker-image').fix ?? '', /vtpmctl image allow/);
    await installation.admin('POST', '/images', { digest, note: '' });
    assert.equal((await doctor()).level('worker-image'), 'ok');
  });

  it('finds what others may read, and its command mends it', async () => {
    const { home, toolstack, manager, supervisor, run: runDirectory } = installation.paths;
    for (const [path, mode, check, level] of [
      [toolstack.key, 0o640, 'key-mode', 'problem'],
      [supervisor.delegateKey, 0o604, 'key-mode', 'problem'],
      [manager.enrolment, 0o644, 'file-mode', 'warning'],
      [manager.store, 0o755, 'home-mode', 'problem'],
      [home, 0o755, 'home-mode', 'warning'],
      [runDirectory, 0o711, 'run-mode', 'warning'],
      [manager.adminSocket, 0o666, 'socket-mode', 'problem'],
    ] as const) {
      const before = statSync(path).mode & 0o777;
      chmodSync(path, mode);
      const found = (await doctor()).get(check);
      assert.equal(found.level, level, path);
      assert.ok(found.message.includes(path), found.message);
      assert.equal((await run('sh', ['-c', found.fix ?? 'false'])).code, 0);
      assert.equal(statSync(path).mode & 0o777, before, path);
    }
    assert.equal((await doctor()).level('file-modes'), 'ok');
  });

  it('finds a disk below the reserve', async () => {
    writeFileSync(installation.paths.config, JSON.stringify({ 'store-reserve': 1048576 }), { mode: 0o600 });
    assert.match((await doctor()).get('disk').message, /no new vTPM is made/);
    rmSync(installation.paths.config);
    assert.equal((await doctor()).level('disk'), 'ok');
  });

  it('finds a daemon whose files others could read', async () => {
    const child = spawn('sh', ['-c', 'umask 022; echo; exec sleep 1000'], {
      stdio: ['ignore', 'pipe', 'ignore'],
    });
    await once(child.stdout, 'data');
    const pid = join(installation.paths.run, 'supervisor.pid');
    try {
      const self = identify(child.pid ?? 0);
      writeFileSync(pid, `${self?.pid}\n${self?.startTime}\n`);
      assert.match((await doctor()).get('umask').message, /umask 0022/);
    } finally {
      rmSync(pid);
      await end(child, 'SIGKILL');
    }
  });

  it('looks at the TPM of a locked manager too, and at what is gone from the TPM', async () => {
    await end(installation.supervisor, 'SIGTERM');
    await end(installation.manager, 'SIGTERM');
    const chip = installation.tpm;
    const { code, stderr } = await run('tpm2_pcrextend', [`7:sha256=${'cd'.repeat(32)}`], {
      TPM2TOOLS_TCTI: `swtpm:path=${chip?.socket}`,
    });
    assert.equal(code, 0, stderr);
    assert.equal((await installation.startManager()).body.status, 'locked');
    const locked = await doctor();
    assert.match(locked.get('manager-locked').message, /PCR/);
    for (const check of ['tpm-nv', 'tpm-anchor', 'tpm-revocation']) assert.equal(locked.level(check), 'ok');
    await end(installation.manager, 'SIGTERM');

    const owner = withPassword(permanent(Rh.OWNER));
    await withTpm(chip, async (tpm) => {
      for (const handle of await listHandles(tpm, Ht.NV_INDEX)) {
        const nvIndex = await readNvIndex(tpm, handle);
        assert.ok(nvIndex);
        await tpm.run(NV_UndefineSpace, { authHandle: owner, nvIndex }, {});
      }
    });
    const without = await doctor();
    for (const check of ['tpm-nv', 'tpm-anchor', 'tpm-revocation']) {
      assert.equal(without.level(check), 'problem', check);
    }
    assert.equal(without.level('tpm-srk'), 'ok');
    await withTpm(chip, async (tpm) => {
      const objectHandle = await readObject(tpm, 0x81000001);
      assert.ok(objectHandle);
      await tpm.run(EvictControl, { auth: owner, objectHandle }, { persistentHandle: 0x81000001 });
    });
    assert.match((await doctor()).get('tpm-srk').message, /is gone/);
  });
});

describe('vtpmctl doctor on the embedded TPM', function () {
  this.timeout(60_000);

  it('says that nothing is hardware-protected, and finds its state gone, without starting it', async () => {
    const installation = await Installation.create({ tpm: 'embedded' });
    try {
      const doctor = async () => visit(await installation.ctl('doctor', '--json'));
      const found = await doctor();
      assert.equal(found.code, 0);
      assert.match(found.get('tpm-hardware').message, /nothing is hardware-protected/);
      assert.equal(existsSync(installation.paths.manager.softtpmSocket), false);
      rmSync(installation.paths.manager.softtpm, { recursive: true });
      assert.match((await doctor()).get('tpm').message, /is missing/);
    } finally {
      await installation.destroy();
    }
  });
});

describe("the doctor's judgement", () => {
  const machine = { isEfi: true, isSecureBoot: true, hasSystemdStub: false };
  const fit: TpmFacts = {
    isStarted: true,
    manufacturer: 'X',
    firmwareVersion: '1',
    missing: [],
    sha256Bank: [0, 7],
    pcrs: { 0: 'aa', 7: 'bb' },
    isOwnerEnabled: true,
    hasOwnerPassword: false,
    lockout: { isLocked: false, failures: 0, recoverySeconds: 10 },
    loaded: 0,
    srk: undefined,
    nvHalf: undefined,
    anchorCounter: undefined,
    revocationCounter: undefined,
    countersLeft: 3,
  };
  const expected: Expectation = {
    location: { kind: 'device', path: '/nowhere/tpm0' },
    pcrSelection: 'sha256:7',
    pcrs: [7],
    srkHandle: 0x81000001,
    enrolment: undefined,
  };
  const worst = (facts: TpmFacts, what: Partial<Expectation> = {}) =>
    judgeTpm(facts, { ...expected, ...what }, machine)
      .filter(({ level }) => level !== 'ok')
      .map(({ check, level }) => `${check} ${level}`);

  it('of a TPM finds each thing that is wrong, and nothing on a fit one', () => {
    assert.deepEqual(worst(fit), ['pcr-coverage note']);
    for (const [change, result] of [
      [{ missing: ['TPM2_Unseal'] }, 'tpm-fitness problem'],
      [{ sha256Bank: [] }, 'tpm-pcr-bank problem'],
      [{ isOwnerEnabled: false }, 'tpm-owner problem'],
      [{ hasOwnerPassword: true }, 'tpm-owner note'],
      [{ lockout: { isLocked: true, failures: 32, recoverySeconds: 10 } }, 'tpm-lockout warning'],
      [{ lockout: { isLocked: false, failures: 1, recoverySeconds: 10 } }, 'tpm-lockout note'],
      [{ loaded: 2 }, 'tpm-room warning'],
      [{ countersLeft: 2 }, 'tpm-nv-space problem'],
      [{ srk: { name: 'ab', flaw: 'it is not a storage key' } }, 'tpm-srk problem'],
    ] as const) {
      assert.deepEqual(worst({ ...fit, ...change }), [result, 'pcr-coverage note'], result);
    }
    assert.deepEqual(worst({ isStarted: false }), ['tpm-started problem']);
    assert.deepEqual(worst({ isStarted: false }, { location: { kind: 'unix', path: '/x' } }), [
      'tpm-started note',
    ]);
  });

  it('of PCRs knows boot loader, command line, initrd and root file system, with GRUB and with systemd-stub', () => {
    const values = Object.fromEntries(Array.from({ length: 16 }, (_, pcr) => [pcr, 'ab']));
    const seven = coverageOf([7], values, machine);
    assert.deepEqual(seven.covered, []);
    assert.deepEqual(seven.better, [0, 2, 4, 7, 8, 9, 15]);
    assert.deepEqual(coverageOf([0, 2, 4, 7, 8, 9, 15], values, machine).uncovered, []);
    const stub = { ...machine, hasSystemdStub: true };
    assert.deepEqual(coverageOf([7], values, stub).better, [0, 2, 4, 7, 11, 12, 15]);
    assert.deepEqual(coverageOf([0, 4, 11, 15], values, stub).uncovered, []);
    // Nobody measures into 8 and 15 here: they are not proposed, and do not count where they are chosen.
    const bare = { ...values, 8: '00', 15: '00' };
    assert.deepEqual(coverageOf([7], bare, machine).better, [0, 2, 4, 7, 9]);
    assert.deepEqual(coverageOf([8, 15], bare, machine).covered, []);
    const off = judgeCoverage('sha256:7', [7], values, { ...machine, isSecureBoot: false }, false);
    assert.ok(off.some(({ check, level }) => check === 'secure-boot' && level === 'warning'));
  });

  it('of swap tells the clear from the encrypted and from memory', () => {
    const swaps = (...devices: string[]) =>
      ['Filename Type Size Used Priority', ...devices.map((device) => `${device} partition 1 0 -2`), ''].join(
        '\n',
      );
    const isEncrypted = (device: string) => device === '/dev/dm-0';
    assert.equal(checkSwap(swaps(), isEncrypted).level, 'ok');
    assert.equal(checkSwap(swaps('/dev/dm-0', '/dev/zram0'), isEncrypted).level, 'ok');
    const plain = checkSwap(swaps('/dev/dm-0', '/dev/sda2'), isEncrypted);
    assert.deepEqual([plain.level, /swapoff \/dev\/sda2 /.test(plain.fix ?? '')], ['warning', true]);
  });

  it('of the kernel finds user namespaces that are off, and a missing seccomp', () => {
    const kernel = (values: Record<string, string>, uid = 1000) =>
      checkKernel({
        uid,
        sysctl: (name) => ({ 'kernel.seccomp.actions_avail': 'kill errno', ...values })[name],
      })
        .filter(({ level }) => level !== 'ok')
        .map(({ check, level }) => `${check} ${level}`);
    assert.deepEqual(kernel({}), []);
    assert.deepEqual(kernel({ 'user.max_user_namespaces': '0' }, 0), ['kernel-userns problem']);
    assert.deepEqual(kernel({ 'kernel.unprivileged_userns_clone': '0' }), ['kernel-userns problem']);
    assert.deepEqual(kernel({ 'kernel.unprivileged_userns_clone': '0' }, 0), []);
    assert.deepEqual(kernel({ 'kernel.apparmor_restrict_unprivileged_userns': '1' }), [
      'kernel-userns warning',
    ]);
    assert.deepEqual(kernel({ 'kernel.seccomp.actions_avail': '' }), ['kernel-seccomp problem']);
  });

  it('of saved states finds those of a newer libtpms', () => {
    const saved = (libtpmsVersion: string, kind = 'live') => [{ id: 'web1', kind, libtpmsVersion }];
    assert.equal(checkSaved(saved('0.9.2'), () => '0.9.2').level, 'ok');
    assert.equal(checkSaved(saved('0.10.0'), () => '0.9.2').level, 'problem');
    assert.equal(checkSaved(saved('0.9.2'), () => '0.10.0').level, 'ok');
    assert.equal(checkSaved(saved('0.10.0', 'retired'), () => '0.9.2').level, 'ok');
  });
});
