import assert from 'node:assert/strict';
import { once } from 'node:events';
import type { ServerResponse } from 'node:http';
import type { Socket } from 'node:net';
import { join } from 'node:path';
import { createLogger } from 'vtpm-common';
import { ApiServer } from 'vtpm-toolstack/supervisor/api-server';
import { connectDoor, removeDirectory, temporaryDirectory, until } from './supervisor-fixture.js';

describe('the socket of the API, when it is closed', () => {
  const log = createLogger('test', { 'log-level': 'silent', 'log-format': 'json' });
  /** More than the kernel holds. */
  const ANSWER = Buffer.alloc(1024 * 1024);
  let directory: string;
  let path: string;
  let server: ApiServer;
  let caller: Socket;
  let asked: ServerResponse | undefined;

  beforeEach(async () => {
    directory = temporaryDirectory();
    path = join(directory, 'api.sock');
    asked = undefined;
    server = await ApiServer.open({
      path,
      log,
      handle: (_, response) => {
        asked = response;
      },
    });
    caller = (await connectDoor(path)).pause();
    caller.on('error', () => undefined);
    caller.write('GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n');
    await until(() => asked !== undefined);
  });
  afterEach(() => {
    caller.destroy();
    removeDirectory(directory);
  });

  it('does not wait for somebody who does not read his answer', async () => {
    const closing = server.close(Promise.resolve());
    asked?.end(ANSWER);
    await closing;
    await assert.rejects(connectDoor(path));
  });

  it('waits for what a call waits for, and gives its answer', async () => {
    let done: () => void = () => undefined;
    let isClosed = false;
    const closing = server
      .close(
        new Promise((resolve) => {
          done = resolve;
        }),
      )
      .then(() => {
        isClosed = true;
      });
    await assert.rejects(connectDoor(path));
    assert.equal(isClosed, false);
    asked?.end(ANSWER);
    done();
    let read = 0;
    caller.on('data', (data: Buffer) => {
      read += data.length;
    });
    caller.resume();
    await once(caller, 'close');
    assert.ok(read > ANSWER.length, `${read} bytes were read`);
    await closing;
  });
});
