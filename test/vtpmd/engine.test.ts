import assert from 'node:assert/strict';
import { type Locality, shutdownClear, startEngine, startupClear, type TpmEngine } from 'vtpmd';
import {
  counterOf,
  createPrimaryRsa,
  getRandom,
  nvDefineCounter,
  nvIncrement,
  nvReadCounter,
  pcrExtend,
  pcrRead,
  pcrReset,
  responseCode,
} from '../support/tpm-commands.js';

const INDEX = 0x01500001;
/** Part 2, section 6.6.3. */
const TPM_RC_LOCALITY = 0x907;

describe('vtpmd engine', () => {
  let engine: TpmEngine | undefined;

  afterEach(() => {
    engine?.terminate();
    engine = undefined;
  });

  function startNew(): TpmEngine {
    engine = startEngine({ manufacture: true });
    assert.equal(responseCode(engine.process(startupClear()).response), 0);
    return engine;
  }

  it('makes a TPM, and starts the same TPM again from its permanent state', () => {
    const first = startNew();
    first.process(nvDefineCounter(INDEX));
    const { response, stored } = first.process(nvIncrement(INDEX));
    assert.equal(responseCode(response), 0);
    assert.ok(stored);
    const permanent = Buffer.from(first.process(shutdownClear()).stored!);
    first.terminate();

    engine = startEngine({ permanent, manufacture: false });
    engine.process(startupClear());
    assert.equal(counterOf(engine.process(nvReadCounter(INDEX)).response), 1n);
  });

  it('brings PCR banks up on a new TPM', () => {
    const { response } = startNew().process(pcrRead(0));
    assert.equal(responseCode(response), 0);
    assert.ok(response.length > 40, 'a digest is in the answer');
  });

  it('runs each command at its own locality, which is 0 where none is said', async () => {
    const tpm = startNew();
    const codeOf = (command: Buffer, locality?: Locality): number =>
      responseCode(tpm.process(command, locality).response);
    const digest = Buffer.alloc(32, 1);
    // In turn, so that each one follows every other. Anything may extend PCR 16, nobody but localities 2 to 4 PCR 17, and
    // locality 2 alone resets PCR 20 (PC client platform profile 1.05, table of PCR attributes).
    for (const locality of [4, undefined, 2, 0, 3, 1, 4, 0, 2, undefined] as const) {
      assert.equal(codeOf(pcrExtend(16, digest), locality), 0);
      const at = locality ?? 0;
      assert.equal(codeOf(pcrExtend(17, digest), locality), at >= 2 ? 0 : TPM_RC_LOCALITY, `extend at ${at}`);
      assert.equal(codeOf(pcrReset(20), locality), at === 2 ? 0 : TPM_RC_LOCALITY, `reset at ${at}`);
    }
    // The same on the thread of slow commands, whose question comes from there.
    const { response } = await tpm.processAsync(pcrReset(20), 2);
    assert.equal(responseCode(response), 0);
    assert.equal(responseCode((await tpm.processAsync(pcrReset(20))).response), TPM_RC_LOCALITY);
  });

  it('keeps a locality apart from the next power-on', () => {
    const first = startNew();
    assert.equal(responseCode(first.process(pcrReset(20), 2).response), 0);
    first.terminate();
    assert.equal(responseCode(startNew().process(pcrReset(20)).response), TPM_RC_LOCALITY);
  });

  it('tells which commands stored permanent state', () => {
    const tpm = startNew();
    assert.equal(tpm.process(getRandom()).stored, undefined);
    assert.ok(tpm.process(nvDefineCounter(INDEX)).stored);
    assert.equal(tpm.process(getRandom()).stored, undefined);
  });

  it('I-9: makes no new TPM where state must exist', () => {
    assert.throws(() => startEngine({ manufacture: false }), { code: 'state-missing' });
    assert.throws(() => startEngine({ permanent: Buffer.alloc(1299), manufacture: false }), {
      code: 'engine',
    });
    assert.throws(() => startEngine({ permanent: Buffer.alloc(1299), manufacture: true }), {
      code: 'state-exists',
    });
    assert.equal(responseCode(startNew().process(getRandom()).response), 0);
  });

  it('runs one TPM per process', () => {
    startNew();
    assert.throws(() => startEngine({ manufacture: true }), { code: 'engine' });
  });

  it('I-10: answers badly framed commands itself', () => {
    const tpm = startNew();
    const badTag = getRandom();
    badTag.writeUInt16BE(0x8003, 0);
    assert.equal(responseCode(tpm.process(badTag).response), 0x1e);
    for (const size of [0, 9, 11, 13, 4096, 0xffffffff]) {
      const lying = getRandom();
      lying.writeUInt32BE(size, 2);
      assert.equal(responseCode(tpm.process(lying).response), 0x142);
    }
    const large = Buffer.alloc(4097);
    large.writeUInt16BE(0x8001, 0);
    large.writeUInt32BE(4097, 2);
    assert.equal(responseCode(tpm.process(large).response), 0x142);
    assert.equal(responseCode(tpm.process(getRandom()).response), 0);
  });

  it('runs a slow command on another thread and leaves the event loop free', async () => {
    const tpm = startNew();
    let turns = 0;
    const timer = setInterval(() => turns++, 1);
    const { response } = await tpm.processAsync(createPrimaryRsa());
    clearInterval(timer);
    assert.equal(responseCode(response), 0);
    assert.equal(response.readUInt32BE(10), 0x80000000);
    assert.ok(turns > 0);
  });

  it('refuses a second command while one runs', async () => {
    const tpm = startNew();
    const running = tpm.processAsync(createPrimaryRsa());
    assert.throws(() => tpm.process(getRandom()), { code: 'engine' });
    tpm.cancel();
    await running;
    assert.equal(responseCode(tpm.process(getRandom()).response), 0);
  });

  it('restores volatile state', () => {
    const tpm = startNew();
    const stored = tpm.process(pcrExtend(16, Buffer.alloc(32, 7)));
    assert.equal(responseCode(stored.response), 0);
    const before = Buffer.from(tpm.process(pcrRead(16)).response);
    const volatile = tpm.volatileState();
    const permanent = tpm.process(nvDefineCounter(INDEX)).stored!;
    tpm.terminate();
    engine = startEngine({ permanent, volatile, manufacture: false });
    assert.deepEqual(Buffer.from(engine.process(pcrRead(16)).response).subarray(-32), before.subarray(-32));
  });
});
