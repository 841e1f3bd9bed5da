import assert from 'node:assert/strict';
import { shutdownClear, startEngine, startupClear, type TpmEngine } from 'vtpmd';
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

  it('runs commands at locality 0', () => {
    const tpm = startNew();
    // Part 3, section 22.8. PCR 16 may be reset from anywhere, PCR 20 from localities 2 to 4 alone: TPM_RC_LOCALITY.
    assert.equal(responseCode(tpm.process(pcrReset(16)).response), 0);
    assert.equal(responseCode(tpm.process(pcrReset(20)).response), 0x907);
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
