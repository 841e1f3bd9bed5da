import assert from 'node:assert/strict';
import { once } from 'node:events';
import { closeSync, writeSync } from 'node:fs';
import { createConnection, createServer, type Server, type Socket } from 'node:net';
import { join } from 'node:path';
import { createLogger, receiveDescriptor, sendDescriptor, socketPair } from 'vtpm-common';
import type { ToolstackError } from 'vtpm-toolstack/error';
import { connectWorkerLink, connectWorkerLinkAgain } from 'vtpm-toolstack/supervisor/manager-link';
import { WorkerLinks } from 'vtpm-toolstack/supervisor/worker-links';
import { removeDirectory, temporaryDirectory, until } from './supervisor-fixture.js';

describe('a manager link', () => {
  let directory: string;
  let path: string;
  let server: Server;
  beforeEach(() => {
    directory = temporaryDirectory();
    path = join(directory, 'worker.sock');
    server = createServer((socket) => socket.on('error', () => {}).end('greeting'));
  });
  afterEach(() => {
    server.close();
    removeDirectory(directory);
  });

  it('still holds all that the manager said when a worker gets it', async () => {
    await once(server.listen(path), 'listening');
    const link = await connectWorkerLink(path);
    // Positive control: the same wait is enough for a connection that is read.
    const other = createConnection(path);
    await until(() => other.bytesRead > 0);
    assert.equal(link.bytesRead, 0);
    link.resume();
    assert.equal(String((await once(link, 'data'))[0]), 'greeting');
    link.destroy();
    other.destroy();
  });

  it('is refused by name while the manager is away, and made when it comes', async () => {
    await assert.rejects(
      connectWorkerLink(path),
      (error) => (error as ToolstackError).code === 'manager-unreachable',
    );
    const link = connectWorkerLinkAgain(path, () => true);
    await once(server.listen(path), 'listening');
    (await link)?.destroy();
    assert.equal(await connectWorkerLinkAgain(path, () => false), undefined);
  });

  it('is the only one that a worker gets this way, however often it says that it has none', async () => {
    const open = new Set<Socket>();
    server = createServer((socket) => {
      open.add(socket);
      socket.on('error', () => {});
      socket.once('close', () => open.delete(socket));
      // Ends are only noticed by who reads.
      socket.resume();
    });
    await once(server.listen(path), 'listening');
    const [ours, theirs] = socketPair();
    const kept: number[] = [];
    const worker = {
      hasEnded: false,
      pass(descriptor: number) {
        sendDescriptor(ours, descriptor);
        kept.push(receiveDescriptor(theirs) ?? -1);
      },
    };
    const log = createLogger('test', { 'log-level': 'silent', 'log-format': 'json' });
    const links = new WorkerLinks(worker, path, () => log);
    for (let round = 1; round <= 3; round++) {
      await links.lost();
      links.up();
      assert.equal(kept.length, round);
      await until(() => open.size === 1);
      assert.equal(isConnected(kept[round - 1] ?? -1), true, 'the newest one works');
    }
    assert.deepEqual(kept.map(isConnected), [false, false, true]);
    links.end();
    await until(() => open.size === 0);
    for (const fd of [ours, theirs, ...kept]) closeSync(fd);
  });

  it('comes seldom to a worker that loses it again and again', async () => {
    await once(server.listen(path), 'listening');
    const said: string[] = [];
    const log = { ...createLogger('test', { 'log-level': 'silent', 'log-format': 'json' }) };
    const noting = Object.assign(log, { warn: (text: string) => said.push(text), info: () => {} });
    const worker = {
      hasEnded: false,
      passed: 0,
      pass() {
        this.passed++;
      },
    };
    const links = new WorkerLinks(worker, path, () => noting as never);
    for (let link = 1; link <= 8; link++) {
      await links.lost();
      links.up();
    }
    assert.ok(!said.some((text) => text.includes('too often')));
    const ninth = links.lost();
    assert.match(said.at(-1) ?? '', /too often; the next one comes within ten seconds/);
    worker.hasEnded = true;
    await ninth;
    assert.equal(worker.passed, 8, 'one that has ended gets none');
    links.end();
  });

  it('of one worker is no matter of the next worker of the same vTPM', async () => {
    const log = createLogger('test', { 'log-level': 'silent', 'log-format': 'json' });
    const worker = () => ({
      hasEnded: false,
      passed: 0,
      pass() {
        this.passed++;
      },
    });
    const first = worker();
    const firstLinks = new WorkerLinks(first, path, () => log);
    const waiting = firstLinks.lost();
    first.hasEnded = true;
    // While the first one's search is still going on, and the manager away:
    const second = worker();
    const links = new WorkerLinks(second, path, () => log);
    const served = links.lost();
    await waiting;
    await once(server.listen(path), 'listening');
    await served;
    assert.deepEqual([first.passed, second.passed], [0, 1]);
    links.up();
    await links.lost();
    assert.equal(second.passed, 2, 'it can be lost again');
    links.end();
  });
});

/** Whether this copy of a link can still be written to. */
function isConnected(fd: number): boolean {
  try {
    return writeSync(fd, 'x') === 1;
  } catch {
    return false;
  }
}
