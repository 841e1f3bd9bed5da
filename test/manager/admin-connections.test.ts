import assert from 'node:assert/strict';
import diagnostics from 'node:diagnostics_channel';
import { once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
import { connect, type Server } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createLogger } from 'vtpm-common';
import { type AdminPlane, serveAdmin } from 'vtpm-manager/admin/server';

describe('connections of the admin plane', () => {
  let directory: string;
  let path: string;
  let plane: AdminPlane;
  const unused = (): never => assert.fail('no call is made');
  const serve = async (requestTimeoutMs: number): Promise<void> => {
    const log = createLogger('test', { 'log-level': 'silent', 'log-format': 'json' });
    plane = await serveAdmin({
      path,
      log,
      requestTimeoutMs,
      auditPath: '/nowhere',
      health: unused,
      metrics: unused,
      doctor: unused,
      service: unused,
      platform: unused,
      erasure: unused,
      audit: unused,
    });
  };
  beforeEach(() => {
    directory = mkdtempSync(join(tmpdir(), 'vtpm-admin-'));
    path = join(directory, 'admin.sock');
  });
  afterEach(async () => {
    await plane.close();
    rmSync(directory, { recursive: true });
  });

  for (const begin of ['', 'GET /heal', 'POST /images HTTP/1.1\r\nhost: x\r\n']) {
    it(`I-10: are closed where no request comes after ${JSON.stringify(begin)}`, async () => {
      await serve(100);
      const socket = connect(path);
      socket.write(begin);
      await once(socket.resume(), 'close');
    });
  }

  it('that are lost while they are accepted do not end the manager', async () => {
    await serve(60_000);
    const accepted = new Promise<Server>((resolve) => {
      diagnostics.subscribe('net.server.socket', function take(message) {
        diagnostics.unsubscribe('net.server.socket', take);
        resolve((message as { socket: { _server: Server } }).socket._server);
      });
    });
    connect(path).on('error', () => undefined);
    const server = await accepted;
    for (let time = 0; time < 2; time++) {
      assert.doesNotThrow(() => server.emit('error', new Error('accept ENFILE')));
    }
  });

  it('end with it', async () => {
    await serve(60_000);
    const socket = connect(path);
    socket.on('error', () => undefined);
    socket.write('GET /heal');
    await once(socket, 'connect');
    await new Promise((resolve) => setImmediate(resolve));
    const closed = once(socket.resume(), 'close');
    await plane.close();
    await closed;
  });
});
