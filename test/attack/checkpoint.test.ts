import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import fc from 'fast-check';
import { CHECKPOINT_LAYOUT } from 'vtpm-common/checkpoint-layout';
import { killAt } from '../support/faulty-worker.js';
import { MiniManager } from '../support/mini-manager.js';
import {
  getRandom,
  nvDefineCounter,
  nvIncrement,
  nvReadCounter,
  startAuthSession,
} from '../support/tpm-commands.js';
import { type KeptGuest, KeptRun, WorkerProcess } from '../support/worker-process.js';

const COUNTER = 0x01500001;
const PCR_EXTEND = `80020000004100000182 0000000a 00000009 400000090000000000 00000001 000b`;
const extend = (): Buffer =>
  Buffer.from(PCR_EXTEND.replaceAll(' ', '') + randomBytes(32).toString('hex'), 'hex');
const PCR_READ = Buffer.from('800100000014 0000017e 00000001 000b03000400'.replaceAll(' ', ''), 'hex');
const STARTUP = Buffer.from('80010000000c000001440000', 'hex');
const FAILURE = '80010000000a00000101';

/** Whoever can write the memory that a supervisor keeps can end a VM run, and nothing else. */
describe('what a worker leaves for the next one', () => {
  let manager: MiniManager;
  let run: KeptRun;
  let worker: WorkerProcess;
  let guest: KeptGuest;
  const workers: WorkerProcess[] = [];
  const spawn = (...nodeArguments: string[]): WorkerProcess => {
    worker = new WorkerProcess(manager, { nodeArguments });
    workers.push(worker);
    return worker;
  };
  const ask = async (command: Buffer): Promise<string> =>
    (await guest.client.transmit(command)).toString('hex');
  const succeed = async (command: Buffer): Promise<string> => {
    const answer = await ask(command);
    assert.equal(answer.slice(12, 20), '00000000');
    return answer;
  };
  /** The answer of the worker that comes next. */
  const next = async (newest?: number) => {
    await worker.kill();
    return spawn().goOn(run, [guest], newest);
  };
  const isRefused = (said: { type: string; reason?: unknown }): void => {
    assert.deepEqual([said.type, said.reason], ['failed', 'no-checkpoint']);
  };

  beforeEach(async () => {
    manager = new MiniManager();
    run = new KeptRun();
    await spawn().begin(run);
    guest = worker.connectKept(run);
    await succeed(nvDefineCounter(COUNTER));
    await succeed(nvIncrement(COUNTER));
    await succeed(extend());
  });
  afterEach(async () => {
    guest.client.close();
    for (const one of workers.splice(0)) await one.kill();
    run.close();
    manager.stop();
  });

  it('control: it goes on from its own', async () => {
    const before = [await succeed(PCR_READ), await succeed(nvReadCounter(COUNTER))];
    assert.equal((await next()).type, 'serving');
    assert.deepEqual([await succeed(PCR_READ), await succeed(nvReadCounter(COUNTER))], before);
  });

  it('an old one is refused', async () => {
    const old = run.image();
    await succeed(extend());
    const newest = run.newest();
    run.put(old);
    isRefused(await next(newest));
  });

  it('one of another VM run is refused, and so is one under the key of another', async () => {
    run.vmRunId.set(randomBytes(16));
    isRefused(await next());
    run.vmRunId.set(randomBytes(16));
    manager.checkpointKey = randomBytes(32);
    isRefused(await next());
  });

  it('one that another permanent state belongs to is refused', async () => {
    const old = run.image();
    await succeed(nvIncrement(COUNTER));
    run.put(old);
    const said = await next();
    isRefused(said);
    assert.match(String(said.message), /belongs to generation/);
  });

  it('the one before the newest is taken only where the save of that one was not committed', async () => {
    await succeed(extend());
    const extended = await succeed(PCR_READ);
    manager.holdSaves = true;
    const saving = manager.next('SAVE');
    guest.client.send(nvIncrement(COUNTER));
    await saving;
    const answered = guest.client.response();
    manager.cut();
    manager.holdSaves = false;
    assert.equal((await next()).type, 'serving');
    assert.equal((await answered).toString('hex').slice(12, 20), '00000000');
    assert.equal(
      (await succeed(nvReadCounter(COUNTER))).slice(32, 48),
      '0000000000000002',
      'once, not twice',
    );
    assert.equal(await succeed(PCR_READ), extended);
  });

  it('nor is it lost where the next worker dies while it writes its own first one, again and again', async () => {
    await succeed(extend());
    const extended = await succeed(PCR_READ);
    manager.holdSaves = true;
    let saving = manager.next('SAVE');
    guest.client.send(nvIncrement(COUNTER));
    const answered = guest.client.response();
    const dies = `data:text/javascript,${encodeURIComponent(killAt('half-checkpoint', 1))}`;
    // As the supervisor has it: never lower than before.
    let newest = 0;
    for (let time = 0; time < 4; time++) {
      await saving;
      manager.cut();
      await worker.kill();
      for (let death = 0; death < 2; death++) {
        newest = Math.max(newest, run.newest());
        void spawn('--import', dies).goOn(run, [guest], newest);
        assert.ok((await worker.exited).signal, worker.log);
        await worker.kill();
      }
      saving = manager.next('SAVE');
      manager.holdSaves = time < 3;
      newest = Math.max(newest, run.newest());
      assert.equal((await spawn().goOn(run, [guest], newest)).type, 'serving');
    }
    assert.equal((await answered).toString('hex').slice(12, 20), '00000000');
    assert.equal((await succeed(nvReadCounter(COUNTER))).slice(32, 48), '0000000000000002', 'once');
    assert.equal(await succeed(PCR_READ), extended);
  });

  it('where that save was committed the answer comes from the newest, and nothing runs again', async () => {
    manager.holdAcks = true;
    const saving = manager.next('SAVE');
    guest.client.send(nvIncrement(COUNTER));
    await saving;
    const answered = guest.client.response();
    manager.cut();
    manager.holdAcks = false;
    assert.equal((await next()).type, 'serving');
    assert.equal((await answered).toString('hex').slice(12, 20), '00000000');
    assert.equal(
      (await succeed(nvReadCounter(COUNTER))).slice(32, 48),
      '0000000000000002',
      'once, not twice',
    );
  });

  it('what ran while the manager was away is in it too', async () => {
    const lost = worker.next('link-lost');
    manager.cut();
    await lost;
    await succeed(extend());
    const extended = await succeed(PCR_READ);
    assert.equal((await next()).type, 'serving');
    assert.equal(await succeed(PCR_READ), extended);
  });

  it('firmware that has not sent Startup finds the TPM as it was', async () => {
    await worker.kill();
    const firmware = new KeptRun();
    manager.checkpointKey = randomBytes(32);
    await spawn().begin(firmware, 'none');
    guest = worker.connectKept(firmware);
    await worker.kill();
    assert.equal((await spawn().goOn(firmware, [guest])).type, 'serving');
    assert.equal((await ask(PCR_READ)).slice(12, 20), '00000100', 'TPM_RC_INITIALIZE');
    await succeed(STARTUP);
    await succeed(PCR_READ);
    firmware.close();
  });

  it('the same one twice gives other random numbers and nonces', async () => {
    const image = run.image();
    const given = new Set<string>();
    for (let time = 0; time < 3; time++) {
      assert.equal((await next()).type, 'serving');
      given.add(await succeed(getRandom(32)));
      // Its nonce is all but the handle.
      given.add((await succeed(startAuthSession())).slice(28));
      run.put(image);
    }
    assert.equal(given.size, 6);
  });

  it('one with a bit flipped is refused, wherever', async () => {
    const image = run.image();
    const newest = run.newest();
    const slot = run.newestSlot();
    const length = CHECKPOINT_LAYOUT.slotHeader + image.readUInt32LE(slot + 8);
    const bit = fc.oneof(
      fc.integer({ min: 0, max: 8 * 12 - 1 }),
      fc.integer({ min: 8 * CHECKPOINT_LAYOUT.slotHeader, max: 8 * length - 1 }),
    );
    await fc.assert(
      fc.asyncProperty(bit, async (flipped) => {
        const changed = Buffer.from(image);
        changed[slot + (flipped >> 3)]! ^= 1 << (flipped & 7);
        run.put(changed);
        isRefused(await next(newest));
      }),
      { numRuns: 12 },
    );
    run.put(image);
    assert.equal((await next(newest)).type, 'serving', 'unchanged it is taken');
  });

  it('none at all is refused', async () => {
    run.put(Buffer.alloc(CHECKPOINT_LAYOUT.bytes));
    isRefused(await next(0));
  });

  it('without one every command fails, Startup too, on old and new connections', async () => {
    const old = guest;
    await worker.kill();
    await spawn().beLost(run, [old]);
    for (const command of [STARTUP, PCR_READ, getRandom(8), STARTUP])
      assert.equal(await ask(command), FAILURE);
    guest = worker.connectKept(run, 'tcti');
    for (const command of [STARTUP, extend()]) assert.equal(await ask(command), FAILURE);
    old.client.close();
  });

  it('the command that was being answered fails too, once', async () => {
    manager.holdSaves = true;
    const saving = manager.next('SAVE');
    guest.client.send(nvIncrement(COUNTER));
    await saving;
    await worker.kill();
    await spawn().beLost(run, [guest]);
    assert.equal((await guest.client.response()).toString('hex'), FAILURE);
    assert.equal(await ask(PCR_READ), FAILURE);
  });
});
