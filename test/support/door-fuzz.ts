import assert from 'node:assert/strict';
import { once } from 'node:events';
import { readdirSync, readFileSync } from 'node:fs';
import { createConnection, type Socket } from 'node:net';
import fc from 'fast-check';
import { frame } from './framed.js';
import { Installation } from './installation.js';
import { MssimClient } from './mssim-client.js';
import { TpmClient } from './tpm-client.js';
import {
  contextSave,
  createPrimaryEcc,
  flushContext,
  getHandles,
  getRandom,
  nvDefineCounter,
  nvIncrement,
  nvReadCounter,
  pcrExtend,
  pcrRead,
  pcrReset,
  readClock,
  responseCode,
  sequenceComplete,
  sequenceStart,
  startAuthSession,
} from './tpm-commands.js';
import { until } from './until.js';

/** Messages that one connection brings. */
const MESSAGES = 10;
/** Growth of the resident memory, in MiB: Node compiles what runs often, and fills its young generation. */
const MOST_GROWTH_MIB = 24;

export const FUZZED_DOORS = ['tpm', 'tcti', 'tcti-ctrl', 'mssim', 'mssim-platform', 'control'] as const;
export type FuzzedDoor = (typeof FUZZED_DOORS)[number];

/** Two vTPMs in their sandboxes, one of which a VMM powers, whose doors get what no client should send. */
export class DoorFuzz {
  readonly #installation: Installation;
  readonly #neighbours = new Map<string, TpmClient>();

  static async create(): Promise<DoorFuzz> {
    const installation = await Installation.create({ tpm: 'embedded' });
    await installation.startManager();
    // With a small heap what is not used any more is collected soon, and what stays shows.
    await installation.startSupervisor({ nodeArgs: ['--max-old-space-size=32', '--max-semi-space-size=1'] });
    await installation.vtpm('guest', '--doors', 'tpm,tcti,mssim');
    await installation.vtpm('vm', '--doors', 'tpm,tcti,control');
    return new DoorFuzz(installation);
  }

  private constructor(installation: Installation) {
    this.#installation = installation;
  }

  destroy(): Promise<void> {
    this.#platform?.close();
    for (const neighbour of this.#neighbours.values()) neighbour.close();
    return this.#installation.destroy();
  }

  /**
   * Sends so many messages through a door. After each connection a neighbour at another one is answered; in the end nothing
   * is left open, and little more memory is used, in the worker and the supervisor.
   */
  async run(door: FuzzedDoor, messages: number): Promise<void> {
    await this.#serveNeighbour(door);
    const pids = [await this.#installation.workerPid(vtpmOf(door)), this.#installation.supervisor?.pid ?? 0];
    const before = pids.map((pid) => ({ descriptors: descriptorsOf(pid), memory: residentMiB(pid) }));
    await fc.assert(
      fc.asyncProperty(
        fc.array(ARBITRARY[door], { minLength: MESSAGES, maxLength: MESSAGES }),
        async (sent) => {
          // The supervisor hears of closed connections at a bounded rate, and until then they are counted.
          await until(
            'room at the door',
            () => descriptorsOf(pids[1] ?? 0) < (before[1]?.descriptors ?? 0) + 32,
          );
          await this.#play(door, sent);
          await this.#serveNeighbour(door);
        },
      ),
      { numRuns: Math.ceil(messages / MESSAGES), endOnFailure: true },
    );
    const pid = await this.#installation.workerPid(vtpmOf(door));
    assert.equal(pid, pids[0], 'the worker ended');
    for (const [index, { descriptors, memory }] of before.entries()) {
      const process = pids[index] ?? 0;
      await until('no descriptor is left', () => descriptorsOf(process) <= descriptors);
      const growth = residentMiB(process) - memory;
      assert.ok(growth < MOST_GROWTH_MIB, `process ${process} grew by ${growth.toFixed(1)} MiB`);
    }
  }

  async #play(door: FuzzedDoor, sent: readonly Buffer[]): Promise<void> {
    switch (door) {
      case 'tpm':
      case 'tcti':
        return await playStream(await this.#connect(door), sent, expectedOfStream);
      case 'mssim':
        return await playStream(await this.#connect(door), sent, expectedOfSimulator);
      case 'mssim-platform':
        return await playStream(await this.#connect(door), sent, expectedOfPlatform);
      case 'tcti-ctrl':
        return await playRequests(await this.#connect(door), sent, ({ length, code }) =>
          length >= 4 && (code === 1 || code === 4) ? 8 : 4,
        );
      case 'control':
        return await playRequests(await this.#connect(door), sent, () => undefined);
    }
  }

  async #connect(door: FuzzedDoor): Promise<Socket> {
    const directory = this.#installation.door(vtpmOf(door)).slice(0, -'tpm.sock'.length);
    const options = { allowHalfOpen: true };
    const socket =
      door === 'mssim' || door === 'mssim-platform'
        ? createConnection({ ...options, host: '127.0.0.1', port: await this.#port(door) })
        : createConnection({
            ...options,
            path: `${directory}${door === 'tcti-ctrl' ? 'tcti.sock.ctrl' : `${door}.sock`}`,
          });
    await once(socket, 'connect');
    return socket;
  }

  #mssimPort: number | undefined;
  #platform: MssimClient | undefined;

  async #port(door: 'mssim' | 'mssim-platform'): Promise<number> {
    if (this.#mssimPort === undefined) {
      const { body } = await this.#installation.supervisord('GET', '/vtpms/guest');
      this.#mssimPort = (body.sockets as { mssim: number }).mssim;
    }
    return this.#mssimPort + (door === 'mssim' ? 0 : 1);
  }

  /** Through the raw door of the same vTPM, which is powered on where the last connection powered it off. */
  async #serveNeighbour(door: FuzzedDoor): Promise<void> {
    const vtpm = vtpmOf(door);
    if (vtpm === 'guest') {
      this.#platform ??= await MssimClient.connect(await this.#port('mssim'));
      assert.equal(await this.#platform.signal(1), 0);
    }
    let neighbour = this.#neighbours.get(vtpm);
    if (!neighbour) {
      neighbour = new TpmClient(createConnection(this.#installation.door(vtpm)));
      this.#neighbours.set(vtpm, neighbour);
    }
    const code = responseCode(await neighbour.transmit(getRandom()));
    // A VMM has the TPM off, or on and not started.
    if (vtpm === 'vm') assert.ok([0, 0x100, 0x101].includes(code), code.toString(16));
    else assert.equal(code, 0);
  }
}

const vtpmOf = (door: FuzzedDoor): string => (door === 'control' ? 'vm' : 'guest');
const descriptorsOf = (pid: number): number => readdirSync(`/proc/${pid}/fd`).length;
const residentMiB = (pid: number): number =>
  Number(/VmRSS:\s+(\d+) kB/.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1]) / 1024;

// What is sent

const word = (value: number): Buffer => {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(value >>> 0);
  return bytes;
};
const anyBytes = (maxLength: number) => fc.uint8Array({ maxLength }).map((bytes) => Buffer.from(bytes));

const COMMANDS: readonly Buffer[] = [
  getRandom(),
  getRandom(48),
  readClock(),
  getHandles(0x80000000),
  pcrRead(7),
  pcrExtend(7, Buffer.alloc(32, 1)),
  pcrReset(16),
  createPrimaryEcc(),
  startAuthSession(),
  contextSave(0x80000000),
  flushContext(0x80000000),
  flushContext(0x02000000),
  nvDefineCounter(0x01500001),
  nvIncrement(0x01500001),
  nvReadCounter(0x01500001),
  sequenceStart(),
  sequenceComplete(0x80000001),
];
const goodCommand = fc.constantFrom(...COMMANDS);
/** A command with some of its bytes changed, the size left right; or cut, with or without a size that says so. */
const badCommand = fc.oneof(
  fc
    .tuple(goodCommand, fc.array(fc.tuple(fc.nat(), fc.nat(255)), { minLength: 1, maxLength: 4 }))
    .map(([command, changes]) => {
      const changed = Buffer.from(command);
      for (const [at, byte] of changes) changed[at % changed.length] = byte;
      changed.writeUInt32BE(changed.length, 2);
      return changed;
    }),
  fc.tuple(goodCommand, fc.nat(), fc.boolean()).map(([command, cut, isSaid]) => {
    const rest = Buffer.from(command.subarray(0, Math.max(10, cut % command.length)));
    if (isSaid) rest.writeUInt32BE(rest.length, 2);
    return rest;
  }),
  fc.tuple(anyBytes(300), fc.integer({ min: 0, max: 0xffffffff })).map(([body, code]) => {
    const header = Buffer.concat([Buffer.from('8001', 'hex'), word(10 + body.length), word(code)]);
    return Buffer.concat([header, body]);
  }),
);
const inFrame = (command: fc.Arbitrary<Buffer>) =>
  fc
    .tuple(
      command,
      fc.oneof(fc.constant(0), fc.nat(255)),
      fc.oneof(
        { weight: 8, arbitrary: fc.constant(undefined) },
        { weight: 1, arbitrary: fc.integer({ min: 0, max: 0xffffffff }) },
      ),
    )
    .map(([bytes, locality, length]) => frame(bytes, locality, length ?? bytes.length));
const tpmMessage = fc.oneof(
  { weight: 4, arbitrary: goodCommand },
  { weight: 4, arbitrary: badCommand },
  { weight: 4, arbitrary: inFrame(fc.oneof(goodCommand, badCommand)) },
  { weight: 1, arbitrary: anyBytes(64) },
);
const request = (codes: fc.Arbitrary<number>, body: fc.Arbitrary<Buffer>) =>
  fc.tuple(codes, body).map(([code, bytes]) => Buffer.concat([word(code), bytes]));
const noBody = fc.constant(Buffer.alloc(0));

const ARBITRARY: Readonly<Record<FuzzedDoor, fc.Arbitrary<Buffer>>> = {
  tpm: tpmMessage,
  tcti: tpmMessage,
  'tcti-ctrl': fc
    .oneof(request(fc.integer({ min: 0, max: 0x20 }), anyBytes(16)), anyBytes(200))
    .filter((bytes) => bytes.length > 0),
  mssim: fc.oneof(
    { weight: 6, arbitrary: inFrame(fc.oneof(goodCommand, badCommand)) },
    { weight: 3, arbitrary: request(fc.constantFrom(5, 7), noBody) },
    {
      weight: 1,
      arbitrary: request(
        fc.constant(6),
        anyBytes(40).map((bytes) => Buffer.concat([word(bytes.length), bytes])),
      ),
    },
    { weight: 1, arbitrary: request(fc.constantFrom(15, 16), fc.integer().map(word)) },
    { weight: 1, arbitrary: request(fc.integer({ min: 0, max: 40 }), anyBytes(12)) },
    { weight: 1, arbitrary: anyBytes(64) },
  ),
  'mssim-platform': fc.oneof(
    { weight: 6, arbitrary: request(fc.constantFrom(1, 3, 4, 9, 10, 11, 12), noBody) },
    { weight: 1, arbitrary: request(fc.constantFrom(2, 17, 20, 21), noBody) },
    { weight: 1, arbitrary: request(fc.integer({ min: 0, max: 40 }), anyBytes(8)) },
  ),
  // Whole ones: what is missing of a request is waited for, half a second each time.
  control: fc.oneof(
    request(
      fc.constantFrom(1, 4, 5, 9, 0x0a, 0x0b, 0x0f, 0x11, 0x12),
      fc.uint8Array({ minLength: 16, maxLength: 24 }).map((bytes) => Buffer.from(bytes)),
    ),
    request(fc.constantFrom(2, 0x0e, 0x0c, 0x10, 0x13), fc.constant(Buffer.alloc(12))),
    request(fc.constantFrom(2), fc.constant(Buffer.alloc(4))),
    request(
      fc.constantFrom(7, 0x0d),
      anyBytes(60).map((bytes) => Buffer.concat([word(bytes.length), word(1), word(bytes.length), bytes])),
    ),
    request(fc.integer({ min: 0x14, max: 0xffffffff }), anyBytes(100)),
  ),
};

// What must come back

type Expected = { readonly answers: readonly ('bare' | 'framed' | number)[] };

/** Answers to commands, bare and framed, and where their framing ends. */
function expectedOfStream(stream: Buffer): Expected {
  const answers: ('bare' | 'framed')[] = [];
  for (let rest = stream; rest.length >= 9; ) {
    const isFramed = rest.readUInt32BE(0) === 8;
    if (!isFramed && rest.length < 10) break;
    const size = rest.readUInt32BE(isFramed ? 5 : 2);
    const isBroken = size < 10 || size > 4096;
    const length = isFramed ? 9 + size : size;
    if (!isBroken && rest.length < length) break;
    answers.push(isFramed ? 'framed' : 'bare');
    if (isBroken) break;
    rest = rest.subarray(length);
  }
  return { answers };
}

function expectedOfSimulator(stream: Buffer): Expected {
  const answers: ('framed' | number)[] = [];
  for (let rest = stream; rest.length >= 4; ) {
    const code = rest.readUInt32BE(0);
    if (code === 8) {
      const { answers: one } = expectedOfStream(
        rest.subarray(0, rest.length < 9 ? 0 : 9 + Math.min(rest.readUInt32BE(5), 4097)),
      );
      const size = rest.length < 9 ? 0 : rest.readUInt32BE(5);
      if (one.length === 0) break;
      answers.push('framed');
      if (size < 10 || size > 4096) break;
      rest = rest.subarray(9 + size);
      continue;
    }
    if ((code === 6 || code === 15 || code === 16) && rest.length < 8) break;
    const value = rest.length < 8 ? 0 : rest.readUInt32BE(4);
    const length =
      code === 5 || code === 7
        ? 4
        : code === 15 || code === 16
          ? 8
          : code === 6 && value <= 4096
            ? 8 + value
            : 0;
    if (rest.length < length) break;
    if (code === 20) break;
    answers.push(code === 15 && value !== 0 ? 12 : 4);
    if (length === 0 || (code === 15 && value === 0)) break;
    rest = rest.subarray(length);
  }
  return { answers };
}

function expectedOfPlatform(stream: Buffer): Expected {
  const answers: number[] = [];
  for (let rest = stream; rest.length >= 4; rest = rest.subarray(4)) {
    const code = rest.readUInt32BE(0);
    if (code === 20) break;
    answers.push(4);
    if (![1, 2, 3, 4, 9, 10, 11, 12, 17].includes(code)) break;
  }
  return { answers };
}

/** All of it, and then nothing more; what comes back is read to its end. */
async function playStream(
  socket: Socket,
  sent: readonly Buffer[],
  expect: (stream: Buffer) => Expected,
): Promise<void> {
  const received: Buffer[] = [];
  socket.on('data', (chunk: Buffer) => received.push(chunk));
  socket.on('error', () => {});
  const closed = new Promise((resolve) => socket.once('close', resolve));
  const ended = new Promise((resolve) => socket.once('end', resolve));
  // In one piece: behind what ends a connection nothing more is taken.
  socket.end(Buffer.concat(sent));
  await Promise.race([ended, closed]);
  socket.destroy();
  await closed;
  checkAnswers(Buffer.concat(received), expect(Buffer.concat(sent)).answers);
}

function checkAnswers(received: Buffer, expected: Expected['answers']): void {
  let rest = received;
  for (const kind of expected) {
    if (typeof kind === 'number') {
      assert.ok(rest.length >= kind, 'an answer is missing');
      rest = rest.subarray(kind);
      continue;
    }
    const head = kind === 'framed' ? 4 : 0;
    assert.ok(rest.length >= head + 10, 'an answer is missing');
    const size = rest.readUInt32BE(head + 2);
    assert.ok(size >= 10 && rest.length >= 2 * head + size, 'an answer is not whole');
    if (head > 0) {
      assert.equal(rest.readUInt32BE(0), size);
      assert.equal(rest.readUInt32BE(4 + size), 0);
    }
    rest = rest.subarray(2 * head + size);
  }
  assert.equal(rest.toString('hex'), '', 'nothing else came');
}

/** One after another, each when the one before is answered or the connection is closed. */
async function playRequests(
  socket: Socket,
  sent: readonly Buffer[],
  lengthOf: (request: { readonly length: number; readonly code: number }) => number | undefined,
): Promise<void> {
  let isOver = false;
  let received = Buffer.alloc(0);
  socket.on('data', (chunk: Buffer) => {
    received = Buffer.concat([received, chunk]);
  });
  socket.on('error', () => {});
  const over = new Promise<void>((resolve) => {
    const end = (): void => {
      isOver = true;
      resolve();
    };
    socket.on('end', end);
    socket.on('close', end);
  });
  for (const bytes of sent) {
    if (isOver) break;
    received = Buffer.alloc(0);
    const answered = new Promise((resolve) => socket.once('data', resolve));
    socket.write(bytes);
    await Promise.race([answered, over]);
    if (isOver) break;
    assert.ok(received.length >= 4);
    const length = lengthOf({ length: bytes.length, code: bytes.length < 4 ? -1 : bytes.readUInt32BE(0) });
    if (length !== undefined) assert.equal(received.length, length, bytes.toString('hex'));
  }
  socket.destroy();
}
