import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { once } from 'node:events';
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { connect, createServer, type Server, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { ControlCapability, openSwtpm, type SwtpmTransport } from 'tpm2-ts-bindings';
import { type Swtpm, startSwtpm } from '../support/swtpm.js';
import { TpmClient } from '../support/tpm-client.js';
import { getRandom, pcrExtend, pcrRead, pcrReset, responseCode } from '../support/tpm-commands.js';
import { has } from './make.js';

const STARTUP_CLEAR = Buffer.from('80010000000c000001440000', 'hex');
const LOCALITY = 0x907;
const INITIALIZE = 0x100;
const FAILURE = 0x101;
const sha256 = (...parts: Uint8Array[]): Buffer => createHash('sha256').update(Buffer.concat(parts)).digest();

describe('tpm2-ts-bindings: swtpm with its control channel', () => {
  let swtpm: Swtpm;
  let transport: SwtpmTransport;
  const open = (options = {}) =>
    openSwtpm({ data: { path: swtpm.socket }, control: { path: swtpm.control } }, options);
  const run = async (command: Buffer): Promise<number> => responseCode(await transport.transmit(command));
  const pcr = async (index: number): Promise<Buffer> =>
    (await transport.transmit(pcrRead(index))).subarray(-32);

  beforeEach(async () => {
    swtpm = await startSwtpm();
    transport = await open();
  });
  afterEach(async () => {
    await transport.close();
    await swtpm.stop();
  });

  it('says what it can do', async () => {
    const bits = await transport.capabilities();
    for (const name of ['INIT', 'SHUTDOWN', 'SET_LOCALITY', 'HASHING', 'CANCEL_TPM_CMD', 'STOP'] as const) {
      assert.ok((bits & ControlCapability[name]) !== 0, name);
    }
    // A 64-bit field read as 32 bits would show none, one read in the other byte order others.
    assert.equal(bits >>> 17, 0);
  });

  it('a D-RTM measurement sets PCR 17 and the established bit', async () => {
    const data = Buffer.alloc(9000, 0x5a);
    assert.equal(await transport.established(), false);
    await transport.hash(data);
    assert.equal(await transport.established(), true);
    assert.deepEqual(await pcr(17), sha256(Buffer.alloc(32), sha256(data)));
    await transport.hash(Buffer.alloc(0));
    assert.deepEqual(await pcr(17), sha256(Buffer.alloc(32), sha256()));
    await assert.rejects(transport.resetEstablished(0), /CMD_RESET_TPMESTABLISHED was refused with 0x3d/);
    assert.equal(await transport.established(), true, 'and a refusal ends nothing');
    await transport.resetEstablished(3);
    assert.equal(await transport.established(), false);
  });

  it('stopped, it refuses; after init it wants TPM2_Startup', async () => {
    await transport.stop();
    assert.equal(await run(getRandom()), FAILURE);
    await assert.rejects(transport.established(), (error: unknown) => {
      assert.match(String(error), /CMD_GET_TPMESTABLISHED was refused with 0xa \(TPM_BAD_ORDINAL/);
      return has('transport')(error);
    });
    await transport.init();
    assert.equal(await run(getRandom()), INITIALIZE);
    assert.equal(await run(STARTUP_CLEAR), 0);
    assert.equal(await run(getRandom()), 0);
  });

  it('a power cycle resets PCRs', async () => {
    await transport.transmit(pcrExtend(16, Buffer.alloc(32, 7)));
    assert.notDeepEqual(await pcr(16), Buffer.alloc(32));
    await transport.powerCycle();
    assert.equal(await run(STARTUP_CLEAR), 0);
    assert.deepEqual(await pcr(16), Buffer.alloc(32));
  });

  it('init removes stored volatile state where it is asked to', async () => {
    const stored = join(swtpm.directory, 'tpm2-00.volatilestate');
    await transport.transmit(pcrExtend(16, Buffer.alloc(32, 7)));
    const extended = await pcr(16);
    await transport.close();
    const control = new TpmClient(connect({ path: swtpm.control }));
    // CMD_STORE_VOLATILE
    control.send('0000000a');
    assert.deepEqual(await control.bytes(4), Buffer.alloc(4));
    control.close();
    transport = await open();
    for (const [deleteVolatile, isThere] of [
      [false, true],
      [true, false],
    ] as const) {
      await transport.init({ deleteVolatile });
      assert.deepEqual(await pcr(16), extended);
      assert.equal(existsSync(stored), isThere);
    }
  });

  it('shutdown ends the process and the transport', async () => {
    const exited = once(swtpm.process, 'exit');
    await transport.shutdown();
    await exited;
    await assert.rejects(transport.transmit(getRandom()), has('transport'));
    await assert.rejects(transport.capabilities(), has('transport'));
  });

  it('the locality is that of the commands that follow', async () => {
    assert.equal(await run(pcrReset(20)), LOCALITY);
    await transport.setLocality(2);
    assert.equal(await run(pcrReset(20)), 0);
    await transport.setLocality(0);
    assert.equal(await run(pcrReset(20)), LOCALITY);
    for (const wrong of [-1, 5, 1.5]) await assert.rejects(transport.setLocality(wrong), has('usage'));
  });

  it('commands and operations take turns', async () => {
    const answers = await Promise.all([
      transport.transmit(pcrExtend(16, Buffer.alloc(32, 7))),
      transport.powerCycle(),
      transport.transmit(getRandom()),
      transport.transmit(STARTUP_CLEAR),
      transport.established(),
      transport.transmit(getRandom()),
    ]);
    const codes = answers.map((answer) => (Buffer.isBuffer(answer) ? responseCode(answer) : answer));
    assert.deepEqual(codes, [0, undefined, INITIALIZE, 0, false, 0]);
  });

  it('a full queue of connections is waited for, within the time to connect', async () => {
    // It has taken this connection from the queue.
    await transport.capabilities();
    const others: Socket[] = [];
    for (let isFull = false; !isFull; ) {
      const other = connect({ path: swtpm.control });
      isFull = await once(other, 'connect').then(
        () => false,
        (error: NodeJS.ErrnoException) => error.code === 'EAGAIN',
      );
      others.push(other.on('error', () => undefined));
    }
    await assert.rejects(open({ connectTimeout: 30 }), /no connection within 30 ms/);
    await transport.close();
    const opening = open();
    for (const other of others) other.destroy();
    transport = await opening;
    assert.equal(await run(getRandom()), 0);
  });

  it('nobody there: a named error, and no connection left', async () => {
    await transport.close();
    const gone = { path: join(swtpm.directory, 'none') };
    await assert.rejects(
      openSwtpm({ data: gone, control: { path: swtpm.control } }),
      /none: there is no such/,
    );
    await assert.rejects(
      openSwtpm({ data: { path: swtpm.socket }, control: gone }),
      /none: there is no such/,
    );
    transport = await open();
    assert.equal(await run(getRandom()), 0);
  });
});

/** Control servers that no swtpm is. */
describe('tpm2-ts-bindings: a control channel that misbehaves', () => {
  let directory: string;
  const servers: Server[] = [];
  before(() => {
    directory = mkdtempSync(join(tmpdir(), 'vtpm-control-'));
  });
  afterEach(async () => {
    for (const server of servers.splice(0)) await new Promise((resolve) => server.close(resolve));
  });
  after(() => rmSync(directory, { recursive: true, force: true }));

  async function listen(behave: (socket: Socket) => void): Promise<{ path: string }> {
    const path = join(directory, `${Math.random().toString(36).slice(2)}.sock`);
    const server = createServer((socket) => {
      socket.on('error', () => undefined);
      behave(socket);
    });
    servers.push(server);
    server.listen(path);
    await once(server, 'listening');
    return { path };
  }

  /** A control server that answers each request with these bytes; the data server is silent. */
  async function answering(answer: string, options = {}): Promise<SwtpmTransport> {
    const control = await listen((socket) =>
      socket.on('data', () => socket.write(Buffer.from(answer, 'hex'))),
    );
    const data = await listen((socket) => socket.resume());
    return openSwtpm({ control, data }, options);
  }

  it('requests are the bytes of the protocol', async () => {
    const sent: string[] = [];
    const control = await listen((socket) =>
      socket.on('data', (chunk: Buffer) => {
        sent.push(chunk.toString('hex'));
        const hasBody = [1, 4].includes(chunk.readUInt32BE(0));
        socket.write(Buffer.alloc(hasBody ? 8 : 4));
      }),
    );
    const data = await listen((socket) => socket.resume());
    const transport = await openSwtpm({ control, data });
    await transport.capabilities();
    await transport.init();
    await transport.init({ deleteVolatile: true });
    await transport.established();
    await transport.setLocality(4);
    await transport.hash(Buffer.from('abc'));
    await transport.resetEstablished(3);
    await transport.powerCycle();
    await transport.cancel();
    await transport.shutdown();
    assert.deepEqual(sent, [
      '00000001',
      '0000000200000000',
      '0000000200000001',
      '00000004',
      '0000000504',
      '00000006',
      '0000000700000003616263',
      '00000008',
      '0000000b03',
      '0000000e',
      '0000000200000000',
      '00000003',
    ]);
  });

  it('an error of four bytes or of the full length harms nothing', async () => {
    for (const answer of ['00000009', '0000000900000000']) {
      const transport = await answering(answer);
      for (let time = 0; time < 2; time++) {
        await assert.rejects(
          transport.capabilities(),
          /CMD_GET_CAPABILITY was refused with 0x9 \(TPM_FAIL\)/,
        );
      }
      await transport.close();
    }
  });

  it('bytes that do not belong there end both channels', async () => {
    for (const answer of ['000000000000ffff00', '00000009000000', '000000090000000000']) {
      const transport = await answering(answer);
      await assert.rejects(transport.capabilities(), /more bytes came than were announced/);
      await assert.rejects(transport.transmit(getRandom()), has('transport'));
      await assert.rejects(transport.capabilities(), has('transport'));
    }
    const transport = await answering('0000000002000000');
    await assert.rejects(transport.established(), /was answered with 2/);
    await transport.close();
  });

  it('bytes that nobody asked for end both channels', async () => {
    const ended: Promise<unknown>[] = [];
    const control = await listen((socket) => {
      ended.push(once(socket.resume(), 'close'));
      socket.write(Buffer.alloc(4));
    });
    const data = await listen((socket) => ended.push(once(socket.resume(), 'close')));
    const transport = await openSwtpm({ control, data });
    await assert.rejects(transport.transmit(getRandom()), /nobody asked for|control channel failed/);
    assert.equal(ended.length, 2);
    await Promise.all(ended);
  });

  it('no command overtakes a request to cancel the one before it', async () => {
    const events: string[] = [];
    let data: Socket | undefined;
    let answerCommand: () => void = () => undefined;
    const control = await listen((socket) =>
      socket.on('data', (chunk: Buffer) => {
        events.push(`control ${chunk.toString('hex')}`);
        answerCommand();
        // As swtpm does: the command is over, and the request to cancel it is read after that.
        setTimeout(() => {
          events.push('cancelled');
          socket.write(Buffer.alloc(4));
        }, 20);
      }),
    );
    const commands = await listen((socket) => {
      data = socket;
      socket.on('data', (chunk: Buffer) => {
        events.push(`command ${chunk.readUInt16BE(10)}`);
        answerCommand = () => data?.write(Buffer.from('80010000000a00000909', 'hex'));
        if (events.length === 1) void transport.cancel();
        else answerCommand();
      });
    });
    const transport = await openSwtpm({ control, data: commands });
    const first = transport.transmit(getRandom(1));
    const second = transport.transmit(getRandom(2));
    assert.equal(responseCode(await first), 0x909);
    await second;
    assert.deepEqual(events, ['command 1', 'control 00000009', 'cancelled', 'command 2']);
    await transport.close();
  });

  it('silence ends both channels after the deadline', async () => {
    const transport = await answering('', { deadline: 20 });
    await assert.rejects(transport.stop(), /no answer within 20 ms/);
    await assert.rejects(transport.transmit(getRandom()), /control channel failed/);
  });
});
