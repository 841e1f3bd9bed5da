import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { MiniManager } from '../support/mini-manager.js';
import type { TpmClient } from '../support/tpm-client.js';
import {
  contextSave,
  counterOf,
  createPrimaryEcc,
  createPrimaryRsa,
  evictControl,
  flushContext,
  getHandles,
  getRandom,
  handlesOf,
  lockoutCounter,
  lockoutCounterOf,
  nvDefineCounter,
  nvDefineSecret,
  nvIncrement,
  nvReadCounter,
  nvReadSecret,
  pcrExtend,
  pcrRead,
  readClock,
  responseCode,
  sequenceComplete,
  sequenceStart,
  sequenceUpdate,
  startAuthSession,
} from '../support/tpm-commands.js';
import { KeptRun, WorkerProcess } from '../support/worker-process.js';

const INDEX = 0x01500001;
const RETRY = 0x922;
/** Shorter than a guest would have it: no test waits for long. */
const QUICK = { holdMs: { tpm: 20, tcti: 20 } };
const LONG = { holdMs: { tpm: 60_000, tcti: 60_000 } };

for (const isKept of [false, true])
  describe(`I-8 worker: the manager is away, ${isKept ? 'with' : 'without'} checkpoints`, () => {
    let manager: MiniManager;
    let worker: WorkerProcess;
    let client: TpmClient;
    let run: KeptRun;

    async function begin(outage: object = QUICK, startup: 'clear' | 'none' = 'clear'): Promise<void> {
      manager = new MiniManager();
      run = new KeptRun();
      worker = new WorkerProcess(manager);
      await (isKept ? worker.begin(run, startup, outage) : worker.serve(startup, outage));
      client = worker.connect('tpm');
    }

    afterEach(async () => {
      await worker.kill();
      manager.stop();
      run.close();
    });

    async function loseManager(): Promise<void> {
      const lost = worker.next('link-lost');
      manager.cut();
      await lost;
    }

    async function findManager(): Promise<void> {
      const up = worker.next('link-up');
      worker.relink();
      await up;
    }

    const code = async (command: Buffer): Promise<number> => responseCode(await client.transmit(command));

    /** For everything that is tried after its hold to have been tried. It is never tried where it must not be. */
    async function longEnough(): Promise<void> {
      for (const end = performance.now() + 5 * QUICK.holdMs.tpm; performance.now() < end; )
        await worker.turn();
    }

    it('answers what stores nothing, and RETRY to what stores', async () => {
      await begin();
      assert.equal(await code(nvDefineCounter(INDEX)), 0);
      assert.equal(await code(nvIncrement(INDEX)), 0);
      const saves = manager.saves.length;
      await loseManager();
      assert.equal((await client.transmit(getRandom())).length, 28);
      for (let round = 0; round < 3; round++) {
        const answer = await client.transmit(nvIncrement(INDEX));
        assert.equal(answer.toString('hex'), '80010000000a00000922');
        assert.equal(counterOf(await client.transmit(nvReadCounter(INDEX))), 1n, 'the increment is undone');
      }
      await findManager();
      assert.equal(manager.saves.length, saves, 'nothing that was undone is saved');
      assert.equal(await code(nvIncrement(INDEX)), 0);
      assert.equal(counterOf(await client.transmit(nvReadCounter(INDEX))), 2n);
    });

    it('undoes a command on every door, the slow ones too', async () => {
      await begin();
      assert.equal(await code(createPrimaryEcc()), 0);
      await loseManager();
      const other = worker.connect('tcti');
      assert.equal(responseCode(await other.transmit(nvDefineCounter(INDEX))), RETRY);
      // Key generation runs on another thread; it stores nothing.
      const made = await client.transmit(createPrimaryRsa());
      assert.equal(responseCode(made), 0);
      const object = made.readUInt32BE(10);
      assert.equal(responseCode(await other.transmit(evictControl(object, 0x81000001))), RETRY);
      assert.deepEqual(handlesOf(await client.transmit(getHandles(0x80000000))), [0x80000000, object]);
      assert.deepEqual(handlesOf(await client.transmit(getHandles(0x81000000))), []);
      await findManager();
      assert.equal(await code(evictControl(object, 0x81000001)), 0);
    });

    it('keeps PCRs, objects, sessions, hash sequences, clock and counters over an undo', async () => {
      await begin();
      assert.equal(await code(nvDefineCounter(INDEX)), 0);
      assert.equal(await code(nvIncrement(INDEX)), 0);
      assert.equal(await code(pcrExtend(16, Buffer.alloc(32, 7))), 0);
      const object = (await client.transmit(createPrimaryEcc())).readUInt32BE(10);
      const session = (await client.transmit(startAuthSession())).readUInt32BE(10);
      const sequence = (await client.transmit(sequenceStart())).readUInt32BE(10);
      assert.equal(await code(sequenceUpdate(sequence, 'one ')), 0);
      const before = await client.transmit(readClock());
      const pcr = await client.transmit(pcrRead(16));
      await loseManager();
      assert.equal(await code(nvIncrement(INDEX)), RETRY);
      assert.deepEqual(await client.transmit(pcrRead(16)), pcr);
      assert.deepEqual(handlesOf(await client.transmit(getHandles(0x80000000))), [object, sequence]);
      const after = await client.transmit(readClock());
      assert.ok(timeOf(after) >= timeOf(before) && clockOf(after) >= clockOf(before), 'time goes on');
      assert.deepEqual(
        after.subarray(26),
        before.subarray(26),
        'no reset, no restart, and the clock is safe',
      );
      assert.deepEqual(handlesOf(await client.transmit(getHandles(0x02000000))), [session]);
      assert.equal(await code(sequenceUpdate(sequence, 'two')), 0);
      assert.equal(await code(nvIncrement(INDEX)), RETRY);
      const hashed = await client.transmit(sequenceComplete(sequence));
      assert.deepEqual(hashed.subarray(16, 48), createHash('sha256').update('one two').digest());
      // What an outage let through stays after it.
      assert.equal(await code(pcrExtend(16, Buffer.alloc(32, 8))), 0);
      const extended = await client.transmit(pcrRead(16));
      assert.notDeepEqual(extended.subarray(-32), pcr.subarray(-32));
      await findManager();
      assert.deepEqual((await client.transmit(pcrRead(16))).subarray(-32), extended.subarray(-32));
      assert.equal(await code(contextSave(object)), 0);
      assert.equal(await code(flushContext(session)), 0);
    });

    it('answers random numbers of its own after an undo, and when the manager is back', async () => {
      await begin();
      assert.equal(await code(nvDefineCounter(INDEX)), 0);
      await loseManager();
      const seen = new Set<string>();
      for (let round = 0; round < 4; round++) {
        assert.equal(await code(nvIncrement(INDEX)), RETRY);
        seen.add((await client.transmit(getRandom(32))).toString('hex'));
      }
      assert.equal(await code(nvIncrement(INDEX)), RETRY);
      await findManager();
      seen.add((await client.transmit(getRandom(32))).toString('hex'));
      assert.equal(seen.size, 5);
    });

    it('holds every command for its time before it is tried, each time again', async () => {
      await begin(LONG);
      assert.equal(await code(nvDefineCounter(INDEX)), 0);
      await loseManager();
      client.send(getRandom());
      const other = worker.connect('tcti');
      other.send(nvIncrement(INDEX));
      await worker.turn();
      assert.equal(client.received.length + other.received.length, 0);
      await findManager();
      assert.equal(responseCode(await client.response()), 0);
      assert.equal(
        responseCode(await other.response()),
        0,
        'it ran when the manager was back, and no RETRY was said',
      );
    });

    it('holds Startup and Shutdown until the manager is back', async () => {
      await begin();
      await loseManager();
      const other = worker.connect('tpm');
      client.send('80010000000c000001450000');
      other.send('80010000000c000001440000');
      const third = worker.connect('tpm');
      assert.equal((await third.transmit(getRandom())).length, 28);
      assert.equal((await third.transmit(getRandom())).length, 28);
      assert.equal(client.received.length + other.received.length, 0);
      await findManager();
      assert.equal(responseCode(await client.response()), 0);
      assert.equal(responseCode(await other.response()), 0x100, 'the TPM was not reset');
    });

    it('holds everything while firmware drives the TPM', async () => {
      await begin(QUICK, 'none');
      assert.equal(await code(Buffer.from('80010000000c000001440000', 'hex')), 0);
      const other = worker.connect('tpm');
      await loseManager();
      client.send(getRandom());
      other.send(pcrRead(0));
      await longEnough();
      assert.equal(client.received.length + other.received.length, 0);
      await findManager();
      assert.equal(responseCode(await client.response()), 0);
      assert.equal(responseCode(await other.response()), 0);
      // An operating system's resource manager shows itself.
      const object = (await client.transmit(createPrimaryEcc())).readUInt32BE(10);
      assert.equal(await code(contextSave(object)), 0);
      await loseManager();
      assert.equal(await code(nvDefineCounter(INDEX)), RETRY);
      await findManager();
    });

    it('holds everything while a save from before the outage is not acknowledged', async () => {
      await begin();
      assert.equal(await code(nvDefineCounter(INDEX)), 0);
      manager.holdAcks = true;
      const saved = manager.next('SAVE');
      client.send(nvIncrement(INDEX));
      await saved;
      await loseManager();
      const other = worker.connect('tcti');
      other.send(nvReadCounter(INDEX));
      await longEnough();
      assert.equal(
        client.received.length + other.received.length,
        0,
        'nobody may see an effect that is not durable',
      );
      manager.holdAcks = false;
      await findManager();
      assert.equal(responseCode(await client.response()), 0);
      assert.equal(counterOf(await other.response()), 1n);
    });

    it('saves a slow command that ends when the manager is back, and undoes one that ends before', async () => {
      await begin();
      await loseManager();
      const made = await client.transmit(createPrimaryRsa());
      assert.equal(responseCode(made), 0);
      client.send(createPrimaryRsa());
      await findManager();
      assert.equal(responseCode(await client.response()), 0);
    });

    it('makes no free guesses: a wrong authorisation is counted when the manager is back', async () => {
      await begin();
      assert.equal(await code(nvDefineSecret(INDEX, 'right')), 0);
      // The first use of such an authorisation after Startup is noted in the TPM before it is checked.
      assert.equal(await code(nvReadSecret(INDEX, 'right')), RETRY);
      assert.notEqual(await code(nvReadSecret(INDEX, 'right')), RETRY);
      const before = lockoutCounterOf(await client.transmit(lockoutCounter()));
      await loseManager();
      client.send(nvReadSecret(INDEX, 'wrong'));
      const others = [worker.connect('tpm'), worker.connect('tcti')] as const;
      const gone = worker.connect('tpm');
      assert.equal(responseCode(await others[0].transmit(getRandom())), 0);
      others[0].send(nvReadSecret(INDEX, 'right'));
      gone.send(nvReadSecret(INDEX, 'wrong'));
      assert.equal(
        responseCode(await others[1].transmit(getRandom())),
        0,
        'what needs no authorisation goes on',
      );
      assert.equal(
        lockoutCounterOf(await others[1].transmit(lockoutCounter())),
        before,
        'the count is undone',
      );
      assert.equal(client.received.length + others[0].received.length, 0);
      gone.close();
      client.close();
      await worker.turn();
      await findManager();
      await others[0].response();
      assert.equal(
        lockoutCounterOf(await others[1].transmit(lockoutCounter())),
        before + 2,
        'each guess counts, although those who made them have gone',
      );
    });

    it('flushes what clients leave behind during an outage', async () => {
      await begin();
      const tool = worker.connect('tcti', 4_000_001);
      assert.equal(responseCode(await tool.transmit(createPrimaryEcc())), 0);
      await loseManager();
      tool.close();
      worker.send({ type: 'peer-gone', peer: 4_000_001 });
      assert.deepEqual(handlesOf(await client.transmit(getHandles(0x80000000))), []);
    });

    it('stops in order when the manager is back', async () => {
      await begin();
      await loseManager();
      worker.send({ type: 'stop' });
      client.send(getRandom());
      await worker.turn();
      await findManager();
      await worker.heard('stopped');
      assert.deepEqual(await worker.exited, { code: 0, signal: null });
    });

    it('goes through many outages', async () => {
      await begin();
      assert.equal(await code(nvDefineCounter(INDEX)), 0);
      let counted = 0n;
      for (let round = 0; round < 10; round++) {
        await loseManager();
        client.send(nvIncrement(INDEX));
        if (round % 2 === 0) await client.response();
        else counted++;
        await findManager();
        if (round % 2 === 1 && responseCode(await client.response()) === RETRY) counted--;
      }
      assert.equal(counterOf(await client.transmit(nvReadCounter(INDEX))), counted);
    });

    it('refuses hold times that make no sense', async () => {
      for (const outage of [
        { holdMs: { tpm: 0 } },
        { holdMs: { tpm: 60_001 } },
        { holdMs: { tpm: '400' } },
        { holdMs: { toString: 400 } },
        { holdMs: 400 },
        null,
        'soon',
      ]) {
        manager = new MiniManager();
        worker = new WorkerProcess(manager);
        const { publicKey } = await worker.heard('ready');
        worker.send({ ...manager.identity(publicKey as string), outage });
        assert.equal((await worker.heard('failed')).reason, 'protocol');
        await worker.kill();
        manager.stop();
      }
    });
  });

/** TPMS_TIME_INFO after the header: u64 time, u64 clock, u32 reset count, u32 restart count, u8 safe. */
function timeOf(response: Buffer): bigint {
  return response.readBigUInt64BE(10);
}

function clockOf(response: Buffer): bigint {
  return response.readBigUInt64BE(18);
}
