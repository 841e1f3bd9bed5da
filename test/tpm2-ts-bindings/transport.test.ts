import assert from 'node:assert/strict';
import { once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
import { connect, createServer, type Server, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import {
  createTpm,
  openDevice,
  openSocket,
  overSocket,
  Rc,
  readRandom,
  retrying,
  type Transport,
} from 'tpm2-ts-bindings';
import { startSwtpm } from '../support/swtpm.js';
import { connectTpm } from '../support/tpm-fixture.js';
import { has } from './make.js';

const isTransport = has('transport');
const COMMAND = Buffer.from('80010000000c0000017b0008', 'hex');
const OK = Buffer.from('80010000000a00000000', 'hex');

function answer(rc: number): Buffer {
  const out = Buffer.from(OK);
  out.writeUInt32BE(rc, 6);
  return out;
}

describe('tpm2-ts-bindings: transports', () => {
  let directory: string;
  let server: Server | undefined;
  before(() => {
    directory = mkdtempSync(join(tmpdir(), 'vtpm-transport-'));
  });
  afterEach(async () => {
    const ending = server;
    server = undefined;
    if (ending !== undefined) await new Promise<void>((resolve) => ending.close(() => resolve()));
  });
  after(() => rmSync(directory, { recursive: true, force: true }));

  /** A TPM that does what `behave` says with each chunk. */
  async function fake(behave: (socket: Socket, chunk: Buffer) => void): Promise<string> {
    const path = join(directory, `fake-${Math.random().toString(36).slice(2)}.sock`);
    server = createServer((socket) => {
      socket.on('error', () => undefined);
      socket.on('data', (chunk: Buffer) => behave(socket, chunk));
    });
    await new Promise<void>((resolve) => server?.listen(path, resolve));
    return path;
  }

  it('a connection that is there already: its end, and a deadline, are told by the name that was given', async () => {
    const path = await fake((socket, chunk) => {
      if (chunk.equals(COMMAND)) socket.write(OK);
    });
    const socket = connect(path);
    await once(socket, 'connect');
    const transport = overSocket(socket, 'the vTPM', { deadline: 100 });
    assert.deepEqual(await transport.transmit(COMMAND), OK);
    await assert.rejects(transport.transmit(OK), /^TpmError: the vTPM: no answer within 100 ms$/);
    assert.ok(socket.destroyed);
  });

  it('socket: an answer in pieces is put together', async () => {
    const path = await fake((socket) => {
      socket.write(OK.subarray(0, 3));
      setImmediate(() => socket.write(OK.subarray(3)));
    });
    const transport = await openSocket(path);
    assert.deepEqual(await transport.transmit(COMMAND), OK);
    await transport.close();
  });

  it('socket: after the deadline a late answer is nobody’s', async () => {
    let late: Socket | undefined;
    const path = await fake((socket) => {
      late = socket;
    });
    const transport = await openSocket(path, { deadline: 30 });
    await assert.rejects(transport.transmit(COMMAND), /no answer within 30 ms/);
    late?.write(OK);
    await assert.rejects(transport.transmit(COMMAND), isTransport);
    await transport.close();
  });

  it('socket: a closed connection rejects the waiter and all after it', async () => {
    const path = await fake((socket) => socket.destroy());
    const tpm = createTpm(await openSocket(path));
    await assert.rejects(readRandom(tpm, 4), isTransport);
    await assert.rejects(readRandom(tpm, 4), isTransport);
    await tpm.close();
  });

  it('socket: answers that lie about their size are refused', async () => {
    for (const bad of ['800100000009000000', '8001ffffffff00000000', '80010000000a0000000000']) {
      const path = await fake((socket) => socket.write(Buffer.from(`${bad}00`, 'hex')));
      const transport = await openSocket(path);
      await assert.rejects(transport.transmit(COMMAND), isTransport, bad);
      await transport.close();
      await new Promise<void>((resolve) => server?.close(() => resolve()));
      server = undefined;
    }
  });

  it('socket: bytes that nobody asked for end the connection', async () => {
    let peer: Socket | undefined;
    const path = await fake((socket) => {
      peer = socket;
      socket.write(OK);
    });
    const transport = await openSocket(path);
    await transport.transmit(COMMAND);
    const closed = new Promise<void>((resolve) => peer?.once('close', () => resolve()));
    peer?.write(OK);
    await closed;
    await assert.rejects(transport.transmit(COMMAND), /nobody asked for/);
  });

  it('socket: one command at a time', async () => {
    const path = await fake((socket) => socket.write(OK));
    const transport = await openSocket(path);
    const first = transport.transmit(COMMAND);
    await assert.rejects(transport.transmit(COMMAND), /already under way/);
    assert.deepEqual(await first, OK);
    await transport.close();
  });

  it('nobody there: a named error', async () => {
    await assert.rejects(openSocket(join(directory, 'none')), /no such socket/);
    await assert.rejects(openDevice(join(directory, 'none')), /no such device/);
  });

  it('a killed TPM is a transport error', async () => {
    const swtpm = await startSwtpm();
    const tpm = await connectTpm(swtpm.socket);
    try {
      await readRandom(tpm, 8);
      await swtpm.kill();
      await assert.rejects(readRandom(tpm, 8), isTransport);
    } finally {
      await tpm.close();
      await swtpm.stop();
    }
  });

  it('retry: only what the TPM did not execute is sent again', async () => {
    const scripted = (...codes: number[]): { transport: Transport; sent: () => number } => {
      let sent = 0;
      return {
        sent: () => sent,
        transport: { transmit: async () => answer(codes[sent++] ?? 0), close: async () => undefined },
      };
    };
    const options = { first: 1, longest: 2, total: 1000 };
    const busy = scripted(Rc.RETRY, Rc.TESTING, Rc.YIELDED, Rc.NV_RATE, 0);
    assert.deepEqual(await retrying(busy.transport, options).transmit(COMMAND), OK);
    assert.equal(busy.sent(), 5);
    for (const code of [Rc.LOCKOUT, 0x98e, Rc.FAILURE, Rc.OBJECT_MEMORY]) {
      const refusing = scripted(code, 0);
      assert.deepEqual(await retrying(refusing.transport, options).transmit(COMMAND), answer(code));
      assert.equal(refusing.sent(), 1);
    }
    const endless = { transmit: async () => answer(Rc.RETRY), close: async () => undefined };
    assert.deepEqual(
      await retrying(endless, { first: 1, longest: 1, total: 3 }).transmit(COMMAND),
      answer(Rc.RETRY),
      'the answer is passed on in the end',
    );
  });

  it('retry: a signal ends the pauses', async () => {
    const controller = new AbortController();
    let sent = 0;
    const busy: Transport = {
      async transmit() {
        sent++;
        // The pause begins after this turn of the event loop.
        setImmediate(() => controller.abort());
        return answer(Rc.RETRY);
      },
      close: async () => undefined,
    };
    const options = { first: 3_600_000, longest: 3_600_000, total: 3_600_000 };
    await assert.rejects(retrying(busy, options).transmit(COMMAND, controller.signal), has('aborted'));
    assert.equal(sent, 1);
    assert.equal(retrying(busy).cancel, undefined);
    let cancels = 0;
    const able = retrying({ ...busy, cancel: async () => void cancels++ });
    await able.cancel?.();
    assert.equal(cancels, 1);
  });
});
