import assert from 'node:assert/strict';
import { once } from 'node:events';
import { closeSync, fstatSync, mkdtempSync, openSync, rmSync } from 'node:fs';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pipePair, socketFd, socketPair } from 'vtpm-common';
import { closeUnknown, isClosing, isSocket, isUnixStream } from 'vtpm-common/passed-descriptors';
import { until } from '../support/until.js';

describe('descriptors that somebody passed', () => {
  const directory = mkdtempSync(join(tmpdir(), 'vtpm-passed-'));
  after(() => rmSync(directory, { recursive: true, force: true }));

  it('are sockets, unix streams, or neither', async () => {
    const [here, there] = socketPair();
    const pipe = pipePair();
    const file = openSync('/proc/self/exe', 'r');
    const unix = createServer().listen(join(directory, 'listener'));
    const tcp = createServer().listen(0, '127.0.0.1');
    await Promise.all([once(unix, 'listening'), once(tcp, 'listening')]);
    const kinds = [here, pipe.read, file, socketFd(unix), socketFd(tcp)].map((fd) => [
      isSocket(fd),
      isUnixStream(fd),
    ]);
    for (const server of [unix, tcp]) server.close();
    for (const fd of [here, there, pipe.read, pipe.write, file]) closeSync(fd);
    assert.deepEqual(kinds, [
      [true, true],
      [false, false],
      [false, false],
      [true, false],
      [true, false],
    ]);
  });

  it('are all closed, though not at once', async () => {
    const files = Array.from({ length: 5 }, () => openSync('/proc/self/exe', 'r'));
    for (const fd of files) closeUnknown(fd);
    assert.equal(isClosing(), true);
    await until('all are closed', () => !isClosing());
    for (const fd of files) assert.throws(() => fstatSync(fd), /EBADF/);
  });
});
