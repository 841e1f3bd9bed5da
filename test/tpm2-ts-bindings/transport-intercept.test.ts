import assert from 'node:assert/strict';
import {
  Create,
  CreatePrimary,
  createTpm,
  GetRandom,
  intercepted,
  type ObservedExchange,
  openSocket,
  readRandom,
  srkTemplate,
  type Transport,
} from 'tpm2-ts-bindings';
import { type Swtpm, startSwtpm } from '../support/swtpm.js';
import { assertNothingLeaked, withPrimary } from '../support/tpm-fixture.js';
import { create, has } from './make.js';

/** Compiles only while every property of what an observer gets is a number: none can hold or lead to a body. */
type Leaf = number | bigint | undefined;
const onlyNumbers: { [K in keyof ObservedExchange]: ObservedExchange[K] extends Leaf ? true : never } = {
  commandCode: true,
  commandSize: true,
  responseSize: true,
  responseCode: true,
  started: true,
  duration: true,
};

describe('tpm2-ts-bindings: interceptor', () => {
  let swtpm: Swtpm;
  beforeEach(async () => {
    swtpm = await startSwtpm();
  });
  afterEach(() => swtpm.stop());

  it('tells codes, sizes and times of each command', async () => {
    const seen: ObservedExchange[] = [];
    const transport = intercepted(await openSocket(swtpm.socket), (exchange) => seen.push(exchange));
    const tpm = createTpm(transport);
    const before = process.hrtime.bigint();
    await readRandom(tpm, 8);
    await assert.rejects(
      tpm.run(CreatePrimary, { primaryHandle: { handle: 0x40000001 } } as never, {} as never),
    );
    await tpm.close();
    assert.equal(seen.length, 1, 'what was never sent is not told');
    const [random] = seen as [ObservedExchange];
    const { commandCode, commandSize, responseSize, responseCode } = random;
    assert.deepEqual(
      { commandCode, commandSize, responseSize, responseCode },
      { commandCode: GetRandom.code, commandSize: 12, responseSize: 20, responseCode: 0 },
    );
    assert.ok(random.started >= before && random.duration > 0n);
    assert.ok(random.started + random.duration <= process.hrtime.bigint());
  });

  it('tells of failures: the TPM’s code, or no answer', async () => {
    const seen: ObservedExchange[] = [];
    const transport = intercepted(await openSocket(swtpm.socket), (exchange) => seen.push(exchange));
    await transport.transmit(Buffer.from('80010000000a00000199', 'hex'));
    await swtpm.kill();
    await assert.rejects(
      transport.transmit(Buffer.from('80010000000c0000017b0008', 'hex')),
      has('transport'),
    );
    assert.deepEqual(
      seen.map(({ commandCode, responseCode, responseSize }) => [commandCode, responseCode, responseSize]),
      [
        [0x199, 0x143, 10],
        [0x17b, undefined, undefined],
      ],
    );
  });

  it('an observer reaches nothing but numbers, with a secret in command and answer', async () => {
    const given: unknown[][] = [];
    const observer = function (this: unknown, ...all: unknown[]): void {
      given.push([this, ...all]);
    };
    const tpm = createTpm(intercepted(await openSocket(swtpm.socket), observer));
    const data = Buffer.from('a secret that is sealed');
    await withPrimary(tpm, srkTemplate(), async (srk) => {
      await create(tpm, srk, srkTemplate(), { auth: data });
    });
    await assertNothingLeaked(tpm);
    await tpm.close();
    assert.ok(given.some((values) => (values[1] as ObservedExchange).commandCode === Create.code));
    for (const [self, exchange, ...more] of given) {
      assert.equal(self, undefined);
      assert.deepEqual(more, []);
      assert.ok(Object.isFrozen(exchange));
      assert.deepEqual(Reflect.ownKeys(exchange as object).sort(), Object.keys(onlyNumbers).sort());
      for (const value of Object.values(exchange as object)) {
        assert.ok(['number', 'bigint', 'undefined'].includes(typeof value));
      }
    }
  });

  it('an observer that throws or rejects breaks nothing', async () => {
    const failing = [
      () => {
        throw new Error('from an observer');
      },
      async () => {
        throw new Error('from an observer');
      },
    ];
    const unhandled: unknown[] = [];
    const note = (reason: unknown): void => void unhandled.push(reason);
    process.prependListener('unhandledRejection', note);
    for (const observer of failing) {
      const tpm = createTpm(intercepted(await openSocket(swtpm.socket), observer));
      assert.equal((await readRandom(tpm, 8)).length, 8);
      assert.equal((await readRandom(tpm, 8)).length, 8);
      await tpm.close();
    }
    // Rejections are reported at the end of a turn of the event loop.
    await new Promise((resolve) => setImmediate(resolve));
    process.off('unhandledRejection', note);
    assert.deepEqual(unhandled, []);
  });

  it('can cancel where the transport in it can', async () => {
    const plain: Transport = { transmit: async () => Buffer.alloc(0), close: async () => undefined };
    assert.equal(intercepted(plain, () => undefined).cancel, undefined);
    let cancels = 0;
    await intercepted({ ...plain, cancel: async () => void cancels++ }, () => undefined).cancel?.();
    assert.equal(cancels, 1);
  });
});
