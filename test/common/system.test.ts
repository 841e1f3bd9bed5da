import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import {
  closeSync,
  fstatSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { connect, createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import {
  lockFile,
  peerCredentials,
  receiveDescriptor,
  sendDescriptor,
  socketFd,
  socketPair,
  writeFileDurably,
} from 'vtpm-common';
import { sendWithDescriptors } from 'vtpm-frontend-driver/system-calls';

describe('system calls', () => {
  let directory: string;
  beforeEach(() => {
    directory = mkdtempSync(join(tmpdir(), 'vtpm-system-'));
  });
  afterEach(() => rmSync(directory, { recursive: true }));

  it('pass descriptors one by one, and say when none is waiting', () => {
    const [a, b] = socketPair();
    const files = ['one', 'two'].map((name) => {
      writeFileSync(join(directory, name), name);
      return openSync(join(directory, name), 'r');
    });
    for (const file of files) sendDescriptor(a, file);
    for (const [index, file] of files.entries()) {
      const received = receiveDescriptor(b)!;
      assert.equal(fstatSync(received).ino, fstatSync(file).ino, `descriptor ${index}`);
      closeSync(received);
    }
    assert.equal(receiveDescriptor(b), undefined);
    for (const fd of [a, b, ...files]) closeSync(fd);
  });

  it('take one of several descriptors that came in one message, and keep none of the others open', () => {
    const [a, b] = socketPair();
    const open = () => readdirSync('/proc/self/fd').length;
    for (const count of [2, 3, 8]) {
      sendWithDescriptors(a, Buffer.of(1), Array(count).fill(a));
      const before = open();
      const received = receiveDescriptor(b)!;
      assert.equal(fstatSync(received).ino, fstatSync(a).ino);
      closeSync(received);
      assert.equal(open(), before, `${count} descriptors`);
      assert.equal(receiveDescriptor(b), undefined);
    }
    for (const fd of [a, b]) closeSync(fd);
  });

  it('tell who is at the other end of a socket', async () => {
    const path = join(directory, 's');
    const credentials = await new Promise((resolve) => {
      const server = createServer((socket) => {
        resolve(peerCredentials(socketFd(socket)));
        socket.destroy();
        server.close();
      }).listen(path, () => connect(path).resume());
    });
    assert.deepEqual(credentials, { pid: process.pid, uid: process.getuid!(), gid: process.getgid!() });
  });

  it('give a lock to one holder, across processes, until it ends', () => {
    const path = join(directory, 'lock');
    const held = lockFile(path)!;
    const script = `import { lockFile } from 'vtpm-common'; process.exit(lockFile(${JSON.stringify(path)}) === undefined ? 7 : 0);`;
    const other = () =>
      spawnSync(process.execPath, ['--input-type=module', '-e', script], { cwd: import.meta.dirname }).status;
    assert.equal(other(), 7);
    closeSync(held);
    assert.equal(other(), 0);
  });

  it('replace a file whole and keep it private', () => {
    const path = join(directory, 'file');
    writeFileDurably(path, 'old');
    writeFileDurably(path, 'new');
    assert.equal(readFileSync(path, 'utf8'), 'new');
    assert.equal(statSync(path).mode & 0o777, 0o600);
  });

  it('I-7 forbid core dumps of the process, which are allowed before', () => {
    const script = `import { forbidCoreDumps, koffi } from 'vtpm-common';
      const dumpable = () => koffi.load('libc.so.6').func('int prctl(int, long, long, long, long)')(3, 0, 0, 0, 0);
      const before = dumpable(); forbidCoreDumps(); console.log(before, dumpable());`;
    const out = spawnSync(process.execPath, ['--input-type=module', '-e', script], {
      cwd: import.meta.dirname,
      encoding: 'utf8',
    });
    assert.equal(out.stdout, '1 0\n', out.stderr);
  });
});
