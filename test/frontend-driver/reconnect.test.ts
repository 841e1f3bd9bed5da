import assert from 'node:assert/strict';
import { once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
import { createServer, type Server, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import {
  FrontendClient,
  FrontendError,
  type FrontendErrorCode,
  forKernel,
  ReconnectingChannel,
} from 'vtpm-frontend-driver';
import { isA } from '../support/is-a.js';

const RANDOM_8 = Buffer.from('80010000000c0000017b0008', 'hex');
const ANSWER = Buffer.from('80010000000a00000000', 'hex');
const SET_LOCALITY = (locality: number): Buffer =>
  Buffer.concat([Buffer.from('80020000000b20001000', 'hex'), Buffer.of(locality)]);

const refused = (code: FrontendErrorCode) => (error: unknown) => {
  assert.ok(isA(error, FrontendError), String(error));
  assert.equal(error.code, code);
  return true;
};

describe('a channel that connects again', () => {
  let directory: string;
  let path: string;
  let server: Server;
  let door: Socket;
  let commands: number;
  let onCommand: () => void;
  let channel: ReconnectingChannel;

  const listen = async (): Promise<void> => {
    server = createServer((socket) => {
      door = socket;
      socket.on('error', () => {});
      socket.on('data', () => {
        commands++;
        onCommand();
      });
    });
    server.listen(path);
    await once(server, 'listening');
  };
  const stop = async (): Promise<void> => {
    const gone = channel ? new Promise((resolve) => door.once('close', resolve)) : undefined;
    server.close();
    door?.destroy();
    await gone;
  };

  beforeEach(async () => {
    directory = mkdtempSync(join(tmpdir(), 'vtpm-again-'));
    path = join(directory, 'tpm.sock');
    commands = 0;
    onCommand = () => door.write(ANSWER);
    await listen();
    channel = await ReconnectingChannel.open(() => FrontendClient.connect(path), { patience: 300 });
  });
  afterEach(async () => {
    await channel.close();
    server.close();
    rmSync(directory, { recursive: true, force: true });
  });

  it('sends what was not sent on the next connection', async () => {
    assert.deepEqual(await channel.transmit(RANDOM_8), ANSWER);
    await stop();
    const waiting = channel.transmit(RANDOM_8);
    await listen();
    assert.deepEqual(await waiting, ANSWER);
    assert.equal(commands, 2);
  });

  it('says of what was sent that it is lost, and never sends it twice', async () => {
    onCommand = () => door.destroy();
    const sent = channel.transmit(RANDOM_8);
    const waiting = channel.transmit(RANDOM_8);
    waiting.catch(() => undefined);
    await assert.rejects(sent, refused('lost'));
    onCommand = () => door.write(ANSWER);
    assert.deepEqual(await waiting, ANSWER, 'the one behind it was not sent before');
    assert.equal(commands, 2);
  });

  it('gives up after a time, and begins anew with the next command', async () => {
    await stop();
    await assert.rejects(channel.transmit(RANDOM_8), refused('unreachable'));
    await assert.rejects(channel.transmit(RANDOM_8, { deadline: 20 }), refused('deadline'));
    await assert.rejects(channel.transmit(RANDOM_8, { signal: AbortSignal.timeout(20) }), refused('aborted'));
    assert.equal(commands, 0);
    await listen();
    assert.deepEqual(await channel.transmit(RANDOM_8), ANSWER);
  });

  it('is closed for good by its user', async () => {
    await channel.close();
    await assert.rejects(channel.transmit(RANDOM_8), refused('closed'));
    assert.equal((await channel.ended).code, 'closed');
  });

  it('tells a kernel something to each command, and keeps its localities from the vTPM', async () => {
    const kernel = forKernel(channel);
    const code = async (command: Buffer): Promise<number> => (await kernel.transmit(command)).readUInt32BE(6);
    assert.equal(await code(SET_LOCALITY(0)), 0);
    assert.equal(await code(SET_LOCALITY(1)), 0x907);
    assert.equal(commands, 0);
    assert.equal(await code(RANDOM_8), 0);
    onCommand = () => door.destroy();
    assert.equal(await code(RANDOM_8), 0x101, 'it may have run');
    server.close();
    assert.equal(await code(RANDOM_8), 0x922, 'it did not run');
  });
});
