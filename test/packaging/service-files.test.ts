import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { cpSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { KVM } from 'vtpm-toolstack/vm/kvm';
import { REPOSITORY } from '../support/installation.js';

const SOURCE = join(REPOSITORY, 'packaging/systemd');
const units = readdirSync(SOURCE).filter((name) => /\.(service|socket)$/.test(name));

describe('the service files', () => {
  let root: string;

  before(() => {
    root = mkdtempSync(join(tmpdir(), 'vtpm-units-'));
    const directory = join(root, 'usr/lib/systemd/system');
    mkdirSync(directory, { recursive: true });
    for (const name of units) cpSync(join(SOURCE, name), join(directory, name));
    // What every host has.
    for (const name of ['sysinit', 'basic', 'sockets', 'shutdown', 'multi-user', 'network-pre']) {
      writeFileSync(join(directory, `${name}.target`), '[Unit]\nDescription=test\n');
    }
    for (const path of [
      'usr/sbin/vtpm-managerd',
      'usr/sbin/vtpm-supervisord',
      'usr/bin/vtpmctl',
      'usr/bin/systemd-tmpfiles',
    ]) {
      mkdirSync(join(root, path, '..'), { recursive: true });
      writeFileSync(join(root, path), '', { mode: 0o755 });
    }
    mkdirSync(join(root, 'usr/lib/vtpm-manager'), { recursive: true });
    writeFileSync(join(root, 'usr/lib/vtpm-manager/allow-installed'), '', { mode: 0o755 });
  });
  after(() => root && rmSync(root, { recursive: true, force: true }));

  const analyze = (...args: string[]) =>
    spawnSync('systemd-analyze', [`--root=${root}`, '--no-pager', ...args], {
      encoding: 'utf8',
      env: { PATH: process.env.PATH, SYSTEMD_LOG_LEVEL: 'warning', LC_ALL: 'C' },
    });

  for (const unit of units) {
    it(`${unit} is understood by systemd, every line of it`, () => {
      const { status, stdout, stderr } = analyze('verify', '--man=no', '--recursive-errors=yes', unit);
      assert.deepEqual([status, stdout, stderr], [0, '', '']);
    });
  }

  // docs/packaging.md has these figures.
  for (const [unit, most] of [
    ['vtpm-managerd.service', 2.4],
    ['vtpm-supervisord.service', 4.5],
  ] as const) {
    it(`${unit} is exposed to ${most} of 10 at most`, () => {
      const { status, stdout, stderr } = analyze(
        'security',
        '--offline=yes',
        `--threshold=${most * 10}`,
        unit,
      );
      assert.equal(status, 0, `${stdout.split('\n').at(-2)}${stderr}`);
    });
  }

  it('come before those of libvirt, and the supervisor after the manager', () => {
    const supervisor = readFileSync(join(SOURCE, 'vtpm-supervisord.service'), 'utf8');
    assert.match(supervisor, /^Before=libvirtd\.service virtqemud\.service$/m);
    assert.match(supervisor, /^After=vtpm-managerd\.socket vtpm-managerd\.service$/m);
    assert.match(supervisor, /^Delegate=yes$/m);
    assert.match(readFileSync(join(SOURCE, 'vtpm-managerd.service'), 'utf8'), /^WatchdogSec=/m);
  });

  it('let the supervisor open what workers in VMs need: else QEMU interprets, and says nothing', () => {
    const supervisor = readFileSync(join(SOURCE, 'vtpm-supervisord.service'), 'utf8');
    assert.match(supervisor, /^DevicePolicy=closed$/m);
    assert.match(supervisor, new RegExp(`^DeviceAllow=${KVM} rw$`, 'm'));
  });
});
