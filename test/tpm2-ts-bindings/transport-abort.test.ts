import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { EventEmitter, once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
import { createServer, type Server } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import {
  CreatePrimary,
  createTpm,
  flush,
  GetRandom,
  intercepted,
  openSession,
  openSocket,
  openSwtpm,
  type PublicArea,
  permanent,
  publicArea,
  Rc,
  Rh,
  type RunOptions,
  readRandom,
  rsaSrkTemplate,
  srkTemplate,
  type Tpm,
  TpmError,
  type Transport,
  withPassword,
} from 'tpm2-ts-bindings';
import { MiniManager } from '../support/mini-manager.js';
import { startRecordingProxy } from '../support/recording-proxy.js';
import { type Swtpm, startSwtpm } from '../support/swtpm.js';
import { assertNothingLeaked, connectTpm, NOTHING, withPrimary } from '../support/tpm-fixture.js';
import { WorkerProcess } from '../support/worker-process.js';
import { has } from './make.js';

/** A key that the TPM has to search primes for. */
function freshRsa(): PublicArea {
  const { value } = rsaSrkTemplate();
  if (value.type !== 0x0001) throw new Error('not RSA');
  return publicArea({ ...value, unique: randomBytes(256) });
}

/** @returns the handle of the key, or undefined where the TPM says CANCELED */
async function generate(tpm: Tpm, options: RunOptions): Promise<number | undefined> {
  try {
    const made = await tpm.run(
      CreatePrimary,
      { primaryHandle: withPassword(permanent(Rh.OWNER)) },
      {
        inSensitive: { userAuth: NOTHING, data: NOTHING },
        inPublic: freshRsa(),
        outsideInfo: NOTHING,
        creationPCR: [],
      },
      [],
      options,
    );
    return made.objectHandle;
  } catch (error) {
    if (TpmError.is(error, Rc.CANCELED)) return undefined;
    throw error;
  }
}

/** A transport that says when the next command is on its way. */
function watched(transport: Transport): { transport: Transport; sent(): Promise<void> } {
  let tell: () => void = () => undefined;
  return {
    transport: {
      transmit(command, signal) {
        const answer = transport.transmit(command, signal);
        // After the turn of the event loop in which the bytes are written.
        setImmediate(tell);
        return answer;
      },
      cancel: () => transport.cancel?.() ?? Promise.reject(new Error('cannot cancel')),
      close: () => transport.close(),
    },
    sent: () =>
      new Promise((resolve) => {
        tell = resolve;
      }),
  };
}

/**
 * Cancels key generations and looks what comes of it and of the command after it.
 * @param enough ends it before `rounds` once so many were stopped
 * @returns how many were stopped
 */
async function cancelRounds(transport: Transport, rounds: number, enough = rounds): Promise<number> {
  const watch = watched(transport);
  const tpm = createTpm(watch.transport);
  let canceled = 0;
  for (let round = 0; round < rounds && canceled < enough; round++) {
    const controller = new AbortController();
    const sent = watch.sent();
    const key = generate(tpm, { signal: controller.signal });
    const next = readRandom(tpm, 8 + (round % 16));
    await sent;
    controller.abort();
    const handle = await key;
    if (handle === undefined) canceled++;
    else await flush(tpm, handle);
    assert.equal((await next).length, 8 + (round % 16), 'the next command has its own answer');
  }
  await assertNothingLeaked(tpm);
  await tpm.close();
  return canceled;
}

describe('tpm2-ts-bindings: giving commands up', () => {
  let swtpm: Swtpm;
  beforeEach(async () => {
    swtpm = await startSwtpm();
  });
  afterEach(() => swtpm.stop());

  it('one that waits is dropped: TPM and session do not notice', async () => {
    const bus = await startRecordingProxy(swtpm.socket);
    const tpm = await connectTpm(bus.path);
    await withPrimary(tpm, srkTemplate(), async (salt) => {
      const session = await openSession(tpm, { kind: 'hmac', salt });
      await readRandom(tpm, 8, [session]);
      bus.forget();
      let begun = 0;
      const internal = session as unknown as { begin(command: string): Buffer };
      const begin = internal.begin.bind(session);
      internal.begin = (command) => {
        begun++;
        return begin(command);
      };
      const controller = new AbortController();
      let isSlowOver = false;
      const slow = generate(tpm, {}).finally(() => {
        isSlowOver = true;
      });
      const given = tpm.run(GetRandom, {}, { bytesRequested: 8 }, [session], { signal: controller.signal });
      const after = readRandom(tpm, 8, [session]);
      controller.abort(new Error('no longer of use'));
      await assert.rejects(given, (error: unknown) => {
        assert.equal((error as TpmError).cause, controller.signal.reason);
        return has('aborted')(error);
      });
      assert.ok(!isSlowOver, 'not kept until its turn');
      await flush(tpm, (await slow) ?? 0);
      assert.equal((await after).length, 8);
      assert.equal(bus.commands.length, 3, 'the key, the random bytes, the flush');
      assert.equal(begun, 1, 'the session is asked for no nonce and bound as it was');
      await assert.rejects(
        tpm.run(GetRandom, {}, { bytesRequested: 8 }, [session], { signal: AbortSignal.abort() }),
        has('aborted'),
      );
      assert.equal(bus.commands.length, 3);
      assert.equal((await readRandom(tpm, 8, [session])).length, 8);
      await session.close();
    });
    await tpm.close();
    await bus.close();
  });

  it('a signal that comes too late changes nothing', async () => {
    const tpm = await connectTpm(swtpm.socket);
    const controller = new AbortController();
    const { randomBytes: bytes } = await tpm.run(GetRandom, {}, { bytesRequested: 8 }, [], {
      signal: controller.signal,
    });
    controller.abort();
    assert.equal(bytes.length, 8);
    assert.equal((await readRandom(tpm, 8)).length, 8);
    await tpm.close();
  });

  it('without a way to ask the TPM, the wait ends and the transport with it', async () => {
    const watch = watched(await openSocket(swtpm.socket));
    const { cancel: _, ...plain } = watch.transport;
    const tpm = createTpm(plain);
    await withPrimary(tpm, srkTemplate(), async (salt) => {
      const session = await openSession(tpm, { kind: 'hmac', salt });
      const controller = new AbortController();
      const sent = watch.sent();
      const key = generate(tpm, { signal: controller.signal });
      await sent;
      controller.abort();
      await assert.rejects(key, /given up while the TPM worked on it/);
      await assert.rejects(readRandom(tpm, 8, [session]), has('transport'));
    });
    await tpm.close();
  });

  it('a session of a command given up on its way is poisoned', async () => {
    const server = createServer((socket) => socket.resume());
    const path = join(swtpm.directory, 'silent.sock');
    server.listen(path);
    await once(server, 'listening');
    const real = await openSocket(swtpm.socket);
    const silent = await openSocket(path);
    let to = real;
    const watch = watched({ transmit: (command) => to.transmit(command), close: () => to.close() });
    const { cancel: _, ...plain } = watch.transport;
    const tpm = createTpm(plain);
    await withPrimary(tpm, srkTemplate(), async (salt) => {
      const session = await openSession(tpm, { kind: 'hmac', salt });
      to = silent;
      const controller = new AbortController();
      const sent = watch.sent();
      const given = tpm.run(GetRandom, {}, { bytesRequested: 8 }, [session], { signal: controller.signal });
      await sent;
      controller.abort();
      await assert.rejects(given, has('transport'));
      await assert.rejects(readRandom(tpm, 8, [session]), has('poisoned'));
    });
    await real.close();
    await new Promise((resolve) => server.close(resolve));
  });

  it('between two tries of the same command, it ends as one that was not executed', async () => {
    const real = await openSocket(swtpm.socket);
    const controller = new AbortController();
    let isBusy = false;
    const transport: Transport = {
      async transmit(command) {
        if (!isBusy) return real.transmit(command);
        setImmediate(() => controller.abort());
        return Buffer.from('80010000000a00000922', 'hex');
      },
      close: () => real.close(),
    };
    const tpm = createTpm(transport, { first: 3_600_000, longest: 3_600_000, total: 3_600_000 });
    await withPrimary(tpm, srkTemplate(), async (salt) => {
      const session = await openSession(tpm, { kind: 'hmac', salt });
      isBusy = true;
      await assert.rejects(
        tpm.run(GetRandom, {}, { bytesRequested: 8 }, [session], { signal: controller.signal }),
        has('aborted'),
      );
      isBusy = false;
      assert.equal((await readRandom(tpm, 8, [session])).length, 8, 'transport and session go on');
      await session.close();
    });
    await tpm.close();
  });

  it('a request to cancel that is refused ends the wait, unless the command is over', async () => {
    for (const isOver of [false, true]) {
      const real = await openSocket(swtpm.socket);
      const events = new EventEmitter();
      const asked = once(events, 'asked');
      const refused = once(events, 'refused');
      const transport: Transport = {
        async transmit(command) {
          const answer = await real.transmit(command);
          await asked;
          if (!isOver) await new Promise(() => undefined);
          return answer;
        },
        async cancel() {
          events.emit('asked');
          await refused;
          throw new TpmError('transport', 'refused');
        },
        close: () => real.close(),
      };
      const tpm = createTpm(transport);
      const controller = new AbortController();
      const given = tpm.run(GetRandom, {}, { bytesRequested: 8 }, [], { signal: controller.signal });
      const after = given.catch(() => undefined).then(() => readRandom(tpm, 8));
      setImmediate(() => controller.abort());
      if (isOver) {
        await given;
        events.emit('refused');
        assert.equal((await after).length, 8, 'the transport goes on');
      } else {
        events.emit('refused');
        await assert.rejects(given, /given up while the TPM worked on it/);
        await assert.rejects(after, has('transport'));
      }
      await real.close();
    }
  });

  it('swtpm: a cancelled key generation ends, and the next command has its own answer', async () => {
    const transport = await openSwtpm({ data: { path: swtpm.socket }, control: { path: swtpm.control } });
    // swtpm reads its control channel between commands only: how many it stops is not for this test to say.
    await cancelRounds(
      intercepted(transport, () => undefined),
      8,
    );
  });
});

// libtpms looks at the request only where it begins to search a prime; vtpmd hands it over while the command runs.
describe('tpm2-ts-bindings: cancelling at a server that listens meanwhile', () => {
  let manager: MiniManager;
  let worker: WorkerProcess;
  let directory: string;
  const servers: Server[] = [];
  before(async () => {
    directory = mkdtempSync(join(tmpdir(), 'vtpm-cancel-'));
    manager = new MiniManager();
    worker = await new WorkerProcess(manager).serve();
  });
  after(async () => {
    await worker.kill();
    manager.stop();
    for (const server of servers) server.close();
    rmSync(directory, { recursive: true, force: true });
  });

  /** A socket that leads to a door of the worker. */
  async function listen(door: 'tcti' | 'tcti-ctrl'): Promise<{ path: string }> {
    const path = join(directory, door);
    const server = createServer((socket) => {
      const { socket: behind } = worker.connect(door);
      behind.pipe(socket).pipe(behind);
      socket.on('close', () => behind.destroy());
    });
    servers.push(server);
    server.listen(path);
    await once(server, 'listening');
    return { path };
  }

  it('a key generation ends with CANCELED', async () => {
    const transport = await openSwtpm({ data: await listen('tcti'), control: await listen('tcti-ctrl') });
    // One that has found its primes already is not stopped, so it takes some.
    assert.equal(await cancelRounds(transport, 200, 4), 4);
  });
});
