import assert from 'node:assert/strict';
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { TpmClient } from '../support/tpm-client.js';
import {
  counterOf,
  createPrimaryRsa,
  getRandom,
  nvDefineCounter,
  nvIncrement,
  nvReadCounter,
  responseCode,
} from '../support/tpm-commands.js';

const PROGRAM = fileURLToPath(new URL('../../../vtpmd/bin/vtpm-softtpm.js', import.meta.url));
const INDEX = 0x01500001;

describe('vtpm-softtpm', () => {
  let directory: string;
  let state: string;
  let socket: string;
  let children: ChildProcess[];

  beforeEach(() => {
    directory = mkdtempSync(join(tmpdir(), 'softtpm-'));
    state = join(directory, 'state');
    socket = join(directory, 'tpm.sock');
    children = [];
  });

  afterEach(async () => {
    for (const child of children) {
      if (child.exitCode !== null || child.signalCode !== null) continue;
      child.kill('SIGKILL');
      await once(child, 'exit');
    }
    rmSync(directory, { recursive: true, force: true });
  });

  function run(...options: string[]): ChildProcess {
    const child = spawn(
      process.execPath,
      [PROGRAM, '--state', state, '--socket', socket, '--log-level', 'error', ...options],
      { stdio: ['ignore', 'pipe', 'pipe'] },
    );
    children.push(child);
    return child;
  }

  async function start(...options: string[]): Promise<ChildProcess> {
    const child = run(...options);
    const [line] = (await once(child.stdout!.setEncoding('utf8'), 'data')) as [string];
    assert.equal(line, 'ready\n');
    return child;
  }

  /** Exit code and standard error of a start that is refused. */
  async function refused(...options: string[]): Promise<{ code: number; message: string }> {
    const child = run(...options);
    let message = '';
    child.stderr!.setEncoding('utf8').on('data', (text: string) => {
      message += text;
    });
    const [code] = (await once(child, 'close')) as [number];
    return { code, message };
  }

  async function client(): Promise<TpmClient> {
    const stream = connect(socket);
    await once(stream, 'connect');
    return new TpmClient(stream);
  }

  it('serves a TPM that is started already, to its owner only', async () => {
    await start('--create');
    assert.equal(statSync(socket).mode & 0o777, 0o600);
    assert.equal(statSync(state).mode & 0o777, 0o700);
    assert.equal(statSync(join(state, 'state')).mode & 0o777, 0o600);
    const [one, two] = [await client(), await client()];
    assert.equal(responseCode(await one.transmit(nvDefineCounter(INDEX))), 0);
    assert.equal(responseCode(await two.transmit(nvIncrement(INDEX))), 0);
    one.send(createPrimaryRsa());
    two.send(getRandom());
    assert.equal(responseCode(await one.response()), 0);
    assert.equal(responseCode(await two.response()), 0);
  });

  it('I-4: has every acknowledged increment after kill -9', async () => {
    let acknowledged = 0n;
    for (let round = 0; round < 3; round++) {
      const child = await start(...(round === 0 ? ['--create'] : []));
      const tpm = await client();
      if (round === 0) await tpm.transmit(nvDefineCounter(INDEX));
      else {
        const value = counterOf(await tpm.transmit(nvReadCounter(INDEX)));
        assert.ok(value >= acknowledged && value <= acknowledged + 3n, `${value} after ${acknowledged}`);
        acknowledged = value;
      }
      for (let count = 0; count < 25; count++) {
        assert.equal(responseCode(await tpm.transmit(nvIncrement(INDEX))), 0);
        acknowledged++;
      }
      tpm.send(Buffer.concat([nvIncrement(INDEX), nvIncrement(INDEX), nvIncrement(INDEX)]));
      child.kill('SIGKILL');
      await once(child, 'exit');
    }
  });

  it('writes the state before the answer', async () => {
    const child = await start('--create');
    const tpm = await client();
    await tpm.transmit(nvDefineCounter(INDEX));
    const before = readFileSync(join(state, 'state'));
    await tpm.transmit(nvIncrement(INDEX));
    assert.notDeepEqual(readFileSync(join(state, 'state')), before);
    child.kill('SIGTERM');
    await once(child, 'exit');
  });

  it('ends with Shutdown(CLEAR) and code 0 on SIGTERM', async () => {
    const child = await start('--create');
    const tpm = await client();
    await tpm.transmit(getRandom());
    const before = readFileSync(join(state, 'state'));
    child.kill('SIGTERM');
    assert.deepEqual(await once(child, 'exit'), [0, null]);
    assert.notDeepEqual(readFileSync(join(state, 'state')), before);
    await start();
    assert.equal(responseCode(await (await client()).transmit(getRandom())), 0);
  });

  it('I-9: makes a TPM only with --create, and never in place of another', async () => {
    const { code, message } = await refused();
    assert.equal(code, 1);
    assert.match(message, /state-missing: .*--create/);
    const first = await start('--create');
    await (await client()).transmit(nvDefineCounter(INDEX));
    first.kill('SIGTERM');
    await once(first, 'exit');
    await start('--create');
    assert.equal(responseCode(await (await client()).transmit(nvIncrement(INDEX))), 0);
  });

  it('I-9: refuses a damaged state file by name, whatever byte it is', async () => {
    const child = await start('--create');
    child.kill('SIGTERM');
    await once(child, 'exit');
    const path = join(state, 'state');
    const good = readFileSync(path);
    for (const offset of [0, 9, 14, 20, 60, good.length - 1]) {
      const bad = Buffer.from(good);
      bad.writeUInt8(bad.readUInt8(offset) ^ 1, offset);
      writeFileSync(path, bad);
      const { code, message } = await refused('--create');
      assert.equal(code, 1);
      assert.match(message, /state-corrupt|newer-format/, `byte ${offset}`);
    }
    for (const length of [0, 20, 48, good.length - 1]) {
      writeFileSync(path, good.subarray(0, length));
      assert.match((await refused('--create')).message, /state-corrupt/);
    }
    writeFileSync(path, good);
    await start();
  });

  it('runs once per state', async () => {
    await start('--create');
    const { code, message } = await refused();
    assert.equal(code, 1);
    assert.match(message, /in-use/);
    assert.equal(responseCode(await (await client()).transmit(getRandom())), 0);
  });
});
