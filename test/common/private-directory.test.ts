import assert from 'node:assert/strict';
import fs, { chmodSync, chownSync, mkdirSync, mkdtempSync, rmSync, statSync } from 'node:fs';
import { syncBuiltinESMExports } from 'node:module';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { privateDirectory } from 'vtpm-common';
import { ManagerInstallation } from '../support/manager-process.js';

const NOBODY = 65534;

describe('a private directory', () => {
  let directory: string;
  beforeEach(() => {
    directory = mkdtempSync(join(tmpdir(), 'vtpm-private-'));
  });
  afterEach(() => rmSync(directory, { recursive: true, force: true }));

  it('is made for its owner alone, with those above it', () => {
    const path = privateDirectory(join(directory, 'a', 'b'));
    for (const made of [path, join(path, '..')]) assert.equal(statSync(made).mode & 0o777, 0o700);
    assert.equal(privateDirectory(path), path);
  });

  it('I-5 is still there after a power loss, with those above it', () => {
    const { fsyncSync } = fs;
    const synced: string[] = [];
    fs.fsyncSync = (fd) => {
      synced.push(fs.readlinkSync(`/proc/self/fd/${fd}`));
      fsyncSync(fd);
    };
    syncBuiltinESMExports();
    try {
      privateDirectory(join(directory, 'a', 'b'));
    } finally {
      fs.fsyncSync = fsyncSync;
      syncBuiltinESMExports();
    }
    assert.deepEqual(synced, [directory, join(directory, 'a')]);
  });

  it('is never one that everybody may write to', () => {
    const path = join(directory, 'open');
    mkdirSync(path);
    for (const mode of [0o777, 0o1777, 0o703]) {
      chmodSync(path, mode);
      assert.throws(() => privateDirectory(path), /everybody may write/);
    }
    chmodSync(path, 0o755);
    privateDirectory(path);
  });

  it("is never another user's", function () {
    if (process.getuid?.() !== 0) return this.skip();
    const path = join(directory, 'theirs');
    mkdirSync(path);
    chownSync(path, NOBODY, NOBODY);
    assert.throws(() => privateDirectory(path), /belongs to user 65534/);
  });

  it('I-2 the manager does not listen where another user may replace its sockets', async () => {
    const manager = new ManagerInstallation();
    try {
      await manager.init('embedded');
      const run = join(manager.home, 'run');
      privateDirectory(run);
      chmodSync(run, 0o777);
      await assert.rejects(manager.start(), /everybody may write/);
      chmodSync(run, 0o700);
      await manager.start();
    } finally {
      await manager.remove();
    }
  });
});
