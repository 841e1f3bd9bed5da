import assert from 'node:assert/strict';
import { once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
import { createServer, type Server, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { FrontendClient, FrontendError, type FrontendErrorCode } from 'vtpm-frontend-driver';
import { isA } from '../support/is-a.js';
import { type Swtpm, startSwtpm } from '../support/swtpm.js';

/** TPM2_GetRandom(8) and TPM2_GetRandom(16): their answers differ in length. */
const RANDOM_8 = Buffer.from('80010000000c0000017b0008', 'hex');
const RANDOM_16 = Buffer.from('80010000000c0000017b0010', 'hex');
const ANSWER = Buffer.from('80010000000a00000000', 'hex');

const refused = (code: FrontendErrorCode) => (error: unknown) => {
  assert.ok(isA(error, FrontendError), String(error));
  assert.equal(error.code, code);
  return true;
};

describe('FrontendClient on a TPM', () => {
  let tpm: Swtpm;
  before(async () => {
    tpm = await startSwtpm();
  });
  after(() => tpm.stop());

  it('gives each caller the answer to its own command, however many wait', async () => {
    const client = await FrontendClient.connect(tpm.socket);
    const commands = Array.from({ length: 40 }, (_, i) => (i % 3 === 0 ? RANDOM_16 : RANDOM_8));
    const answers = await Promise.all(commands.map((command) => client.transmit(command)));
    answers.forEach((answer, i) => {
      assert.equal(answer.readUInt32BE(6), 0);
      assert.equal(answer.length, 12 + (commands[i] === RANDOM_16 ? 16 : 8));
    });
    assert.equal(new Set(answers.map((answer) => answer.toString('hex'))).size, commands.length);
    await client.close();
  });

  it("returns the TPM's own errors as answers", async () => {
    const client = await FrontendClient.connect({ path: tpm.socket });
    const answer = await client.transmit(Buffer.from('80010000000a00000199', 'hex'));
    assert.notEqual(answer.readUInt32BE(6), 0);
    await client.close();
  });
});

describe('FrontendClient on a door that misbehaves', () => {
  let directory: string;
  let path: string;
  let server: Server;
  let commands: Buffer;
  let door: Socket;

  /** What the door does with each piece of a command that it receives. */
  let onData: (chunk: Buffer) => void;

  beforeEach(async () => {
    directory = mkdtempSync(join(tmpdir(), 'vtpm-frontend-'));
    path = join(directory, 'tpm.sock');
    commands = Buffer.alloc(0);
    onData = () => {};
    server = createServer((socket) => {
      door = socket;
      socket.on('error', () => {});
      socket.on('data', (chunk) => {
        commands = Buffer.concat([commands, chunk]);
        onData(chunk);
      });
    });
    server.listen(path);
    await once(server, 'listening');
  });

  afterEach(async () => {
    door?.destroy();
    server.close();
    await once(server, 'close');
    rmSync(directory, { recursive: true, force: true });
  });

  const arrives = () =>
    new Promise<void>((resolve) => {
      onData = () => resolve();
    });

  it('has one command on its way at a time', async () => {
    const client = await FrontendClient.connect(path);
    const arrived = arrives();
    const [first, second] = [client.transmit(RANDOM_8), client.transmit(RANDOM_16)];
    await arrived;
    assert.deepEqual(commands, RANDOM_8);
    const next = arrives();
    door.write(ANSWER);
    assert.deepEqual(await first, ANSWER);
    await next;
    assert.deepEqual(commands, Buffer.concat([RANDOM_8, RANDOM_16]));
    door.write(ANSWER);
    await second;
    await client.close();
  });

  it('never takes a late answer for the next one: giving up a sent command ends the connection', async () => {
    for (const [options, code] of [
      [{ deadline: 20 }, 'deadline'],
      [{ signal: undefined }, 'aborted'],
    ] as const) {
      const client = await FrontendClient.connect(path);
      const controller = new AbortController();
      const arrived = arrives();
      const given = client.transmit(RANDOM_8, {
        ...(code === 'deadline' ? options : { signal: controller.signal }),
      });
      const waiting = client.transmit(RANDOM_16);
      const outcomes = Promise.all([
        assert.rejects(given, refused(code)),
        assert.rejects(waiting, refused('closed')),
      ]);
      await arrived;
      if (code === 'aborted') controller.abort();
      await outcomes;
      door.write(ANSWER);
      await assert.rejects(client.transmit(RANDOM_8), refused('closed'));
      assert.equal((await client.ended).code, 'closed');
      await client.close();
    }
  });

  it('gives up a command that still waits without harm to the others', async () => {
    const client = await FrontendClient.connect(path);
    const controller = new AbortController();
    const arrived = arrives();
    const first = client.transmit(RANDOM_8);
    const given = assert.rejects(
      client.transmit(RANDOM_16, { signal: controller.signal }),
      refused('aborted'),
    );
    const late = assert.rejects(client.transmit(RANDOM_16, { deadline: 1 }), refused('deadline'));
    controller.abort();
    await Promise.all([arrived, given, late]);
    door.write(ANSWER);
    assert.deepEqual(await first, ANSWER);
    const next = arrives();
    const last = client.transmit(RANDOM_8);
    await next;
    door.write(ANSWER);
    assert.deepEqual(await last, ANSWER);
    assert.deepEqual(commands, Buffer.concat([RANDOM_8, RANDOM_8]));
    await client.close();
  });

  it('refuses localities, bad commands and an aborted signal before anything is sent', async () => {
    const client = await FrontendClient.connect(path);
    await assert.rejects(client.transmit(RANDOM_8, { locality: 2 }), refused('locality'));
    await assert.rejects(client.transmit(Buffer.alloc(9)), refused('bad-command'));
    await assert.rejects(client.transmit(Buffer.alloc(4097)), refused('bad-command'));
    await assert.rejects(client.transmit(RANDOM_8.subarray(0, 11)), refused('bad-command'));
    await assert.rejects(client.transmit(RANDOM_8, { signal: AbortSignal.abort() }), refused('aborted'));
    const arrived = arrives();
    const sent = client.transmit(RANDOM_8, { locality: 0 });
    await arrived;
    assert.deepEqual(commands, RANDOM_8);
    door.write(ANSWER);
    await sent;
    await client.close();
  });

  for (const [what, bytes] of [
    ['two answers to one command', Buffer.concat([ANSWER, ANSWER])],
    ['an answer and the beginning of another', Buffer.concat([ANSWER, ANSWER.subarray(0, 3)])],
    ['an impossible size', Buffer.from('8001ffffffff00000000', 'hex')],
  ] as const) {
    it(`ends the connection on ${what}`, async () => {
      const client = await FrontendClient.connect(path);
      onData = () => door.write(bytes);
      await assert.rejects(client.transmit(RANDOM_8), refused('protocol'));
      await assert.rejects(client.transmit(RANDOM_8), refused('protocol'));
    });
  }

  it('ends the connection on an answer that nobody asked for', async () => {
    const client = await FrontendClient.connect(path);
    onData = () => door.write(ANSWER);
    await client.transmit(RANDOM_8);
    door.write(ANSWER);
    assert.equal((await client.ended).code, 'protocol');
  });

  it('rejects what has no answer when the vTPM goes away or the client is closed', async () => {
    const gone = await FrontendClient.connect(path);
    onData = () => door.write(ANSWER.subarray(0, 5), () => door.destroy());
    // Whether it ran is not known; of one that waited it is.
    const [sent, waited] = [gone.transmit(RANDOM_8), gone.transmit(RANDOM_8)];
    await Promise.all([assert.rejects(sent, refused('lost')), assert.rejects(waited, refused('closed'))]);
    await assert.rejects(gone.transmit(RANDOM_8), refused('closed'));

    const closed = await FrontendClient.connect(path);
    const arrived = arrives();
    const waiting = assert.rejects(closed.transmit(RANDOM_8), refused('closed'));
    await arrived;
    await closed.close();
    await closed.close();
    await waiting;
  });

  it('says what stands in the way of a connection', async () => {
    await assert.rejects(FrontendClient.connect(join(directory, 'none.sock')), (error) => {
      refused('unreachable')(error);
      return /not running/.test((error as Error).message);
    });
  });
});
