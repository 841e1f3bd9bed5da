import assert from 'node:assert/strict';
import { createHash, randomBytes } from 'node:crypto';
import type { StateAction } from 'vtpm-proto';
import { ExactGuest } from '../support/exact-guest.js';
import { killAt } from '../support/faulty-worker.js';
import { MiniManager } from '../support/mini-manager.js';
import type { TpmClient } from '../support/tpm-client.js';
import {
  counterOf,
  createPrimaryRsa,
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
  startAuthSession,
} from '../support/tpm-commands.js';
import { KeptRun, makeKept, WorkerProcess } from '../support/worker-process.js';

const INDEX = 0x01500001;
const SECRET = 0x01500002;
const PCR = 16;
const TRANSIENT = 0x80000000;
const LOADED_SESSIONS = 0x02000000;
const digest = createHash('sha256').update('measured').digest();
const extended = createHash('sha256').update(Buffer.alloc(32)).update(digest).digest();

interface Clock {
  readonly time: bigint;
  readonly clock: bigint;
  readonly counts: string;
  readonly safe: number;
}

/** TPMS_TIME_INFO (part 2, section 10.11.6) behind the header. */
function clockOf(response: Buffer): Clock {
  return {
    time: response.readBigUInt64BE(10),
    clock: response.readBigUInt64BE(18),
    counts: response.subarray(26, 34).toString('hex'),
    safe: response.readUInt8(34),
  };
}

describe('a worker that its manager freezes so that the TPM goes on elsewhere', () => {
  let manager: MiniManager;
  let there: MiniManager;
  let run: KeptRun;
  let workers: WorkerProcess[];
  let runs: KeptRun[];

  beforeEach(() => {
    manager = new MiniManager();
    there = new MiniManager();
    workers = [];
    runs = [];
    run = newRun();
  });

  afterEach(async () => {
    for (const worker of workers) await worker.kill();
    for (const one of runs) one.close();
    for (const one of [manager, there]) one.stop();
  });

  function newRun(power: 'on' | 'vmm' = 'on'): KeptRun {
    const made = new KeptRun(power);
    runs.push(made);
    return made;
  }

  /** The same run of the VM, of which nothing is left here. */
  function emptyRun(power: 'on' | 'vmm' = 'on'): KeptRun {
    const made = new KeptRun(power, undefined, run.vmRunId);
    runs.push(made);
    return made;
  }

  function spawn(options: { at?: MiniManager; killedAt?: string; wrapper?: string[] } = {}): WorkerProcess {
    const { at = manager, killedAt, wrapper = [] } = options;
    const prelude = killedAt && `data:text/javascript,${encodeURIComponent(killAt(killedAt, 1))}`;
    const worker = new WorkerProcess(at, { wrapper, nodeArguments: prelude ? ['--import', prelude] : [] });
    workers.push(worker);
    return worker;
  }

  async function freeze(): Promise<void> {
    const frozen = manager.next('FROZEN');
    manager.send('FREEZE', true);
    await frozen;
  }

  /** What a migration brings to the other manager. */
  function move(): void {
    there.saves.push(...manager.saves);
    there.epoch = manager.epoch;
  }

  /** A worker at the other manager, where the VM run has nothing of the worker before. */
  async function arrive(): Promise<WorkerProcess> {
    const worker = spawn({ at: there });
    return worker.begin(emptyRun());
  }

  const uses = (at = manager): (StateAction | undefined)[] => at.saves.map(({ use }) => use?.action);

  async function measured(client: TpmClient): Promise<void> {
    for (const command of [nvDefineCounter(INDEX), nvIncrement(INDEX), pcrExtend(PCR, digest)]) {
      assert.equal(responseCode(await client.transmit(command)), 0);
    }
  }

  async function expectMeasured(client: TpmClient, count = 1n): Promise<void> {
    assert.deepEqual((await client.transmit(pcrRead(PCR))).subarray(-32), extended);
    assert.equal(counterOf(await client.transmit(nvReadCounter(INDEX))), count);
  }

  /** A worker that was frozen and has been told to thaw: its manager holds the save that is to say so. */
  async function thawing(): Promise<{ worker: WorkerProcess; client: TpmClient }> {
    const worker = await spawn().begin(run);
    const { client } = worker.connectKept(run);
    await measured(client);
    await freeze();
    client.send(nvIncrement(INDEX));
    manager.holdSaves = true;
    const saved = manager.next('SAVE');
    manager.send('THAW');
    await saved;
    return { worker, client };
  }

  it('ends what runs with its own answer, saves permanent and volatile state, and answers nothing after', async () => {
    const worker = await spawn().begin(run);
    const { client } = worker.connectKept(run);
    await measured(client);
    const count = manager.saves.length;
    // Slow, and stores nothing.
    client.send(createPrimaryRsa());
    await worker.turn();
    const late = worker.connect('tpm');
    late.send(nvIncrement(INDEX));
    await worker.turn();
    await freeze();
    assert.equal(responseCode(await client.response()), 0, 'it was not cancelled');
    client.send(pcrRead(PCR));
    await worker.turn();
    assert.deepEqual([client.received.length, late.received.length], [0, 0]);
    assert.deepEqual(uses().slice(count), ['SUSPEND']);
  });

  it('thaws with a save of its own, and what waited runs', async () => {
    const { worker, client } = await thawing();
    await worker.turn();
    assert.equal(client.received.length, 0, 'that nobody goes on elsewhere is not durable yet');
    manager.release();
    assert.equal(responseCode(await client.response()), 0);
    assert.deepEqual(uses().slice(-3), ['SUSPEND', 'TAKE_BACK', undefined]);
    await expectMeasured(client, 2n);
    // And again.
    await freeze();
    manager.send('THAW');
    await expectMeasured(client, 2n);
  });

  it('killed while frozen loses nothing: the next one goes on from there, once, with the command that waited', async () => {
    const first = await spawn().begin(run);
    const guest = first.connectKept(run);
    await measured(guest.client);
    await freeze();
    guest.client.send(nvIncrement(INDEX));
    await first.turn();
    await first.kill();
    const second = spawn();
    assert.equal((await second.goOn(run, [guest])).type, 'serving');
    assert.equal(responseCode(await guest.client.response()), 0);
    await expectMeasured(guest.client, 2n);
    assert.deepEqual(uses().slice(-3), ['SUSPEND', 'TAKE_BACK', undefined]);
    await second.kill();
    const third = spawn();
    await third.goOn(run, [guest]);
    await expectMeasured(guest.client, 2n);
    assert.equal(uses().filter((use) => use === 'TAKE_BACK').length, 1);
  });

  for (const barrier of ['before-suspend', 'after-suspend', 'before-start-save', 'after-start-save']) {
    it(`killed at "${barrier}" loses nothing either, whoever goes on`, async () => {
      const isLeaving = barrier.endsWith('suspend');
      const first = await spawn(isLeaving ? { killedAt: barrier } : {}).begin(run);
      const guest = first.connectKept(run);
      await measured(guest.client);
      manager.send('FREEZE', true);
      if (isLeaving) {
        await first.exited;
        const second = spawn();
        assert.equal((await second.goOn(run, [guest])).type, 'serving');
        await expectMeasured(guest.client);
        return;
      }
      await manager.next('FROZEN');
      move();
      const lost = spawn({ at: there, killedAt: barrier });
      const begun = emptyRun();
      lost.begin(begun).catch(() => undefined);
      await lost.exited;
      assert.equal(uses(there).at(-1), barrier === 'after-start-save' ? 'RESTORE' : 'SUSPEND');
      const late = makeKept(begun, 'tpm');
      late.client.send(nvIncrement(INDEX));
      assert.equal((await spawn({ at: there }).goOn(begun, [late])).type, 'serving');
      assert.equal(responseCode(await late.client.response()), 0);
      await expectMeasured(late.client, 2n);
      assert.equal(uses(there).filter((use) => use === 'RESTORE').length, 1);
    });
  }

  it('I-9: is never powered on by a worker that may only go on', async () => {
    const worker = await spawn().begin(run);
    await measured(worker.connectKept(run).client);
    await worker.kill();
    const other = spawn();
    assert.match(String((await other.goOn(emptyRun())).reason), /no-checkpoint/);
    const { publicKey } = await spawn().heard('ready');
    workers.at(-1)!.send(manager.identity(publicKey as string, 'clear', ['RESUME'], run.vmRunId));
    assert.equal((await workers.at(-1)!.heard('failed')).reason, 'no-checkpoint');
  });

  it('D-12: at another manager everything goes on: PCRs, counters, sessions, objects, clock, dictionary attack', async () => {
    const worker = await spawn().begin(run);
    const { client } = worker.connectKept(run);
    let now = client;
    const guest = await ExactGuest.connect({
      transmit: (command) => now.transmit(command),
      close: async () => undefined,
    });
    await guest.round();
    await client.transmit(nvDefineSecret(SECRET, 'right'));
    await client.transmit(nvReadSecret(SECRET, 'wrong'));
    const tries = lockoutCounterOf(await client.transmit(lockoutCounter()));
    assert.equal(tries, 1);
    const random = (await client.transmit(getRandom())).toString('hex');
    const before = clockOf(await client.transmit(readClock()));
    await freeze();
    move();
    const arrived = await arrive();
    assert.equal(uses(there).at(-1), 'RESTORE');
    now = arrived.connect('tpm');
    const after = clockOf(await now.transmit(readClock()));
    assert.ok(after.clock >= before.clock && after.time >= before.time, 'the clock goes on');
    assert.deepEqual([after.counts, after.safe], [before.counts, before.safe]);
    await guest.round();
    assert.equal(lockoutCounterOf(await now.transmit(lockoutCounter())), tries);
    assert.notEqual((await now.transmit(getRandom())).toString('hex'), random);
    // Once: what was restored is not there any more.
    await arrived.kill();
    await arrive();
    assert.equal(uses(there).filter((use) => use === 'RESTORE').length, 1);
  });

  // Where another host was booted at another time its clock says something else.
  for (const seconds of [-30, 300]) {
    it(`D-12: the clock goes on where that of the other host is ${seconds} s away`, async () => {
      const worker = await spawn().begin(run);
      const before = clockOf(await worker.connectKept(run).client.transmit(readClock()));
      await freeze();
      move();
      const offset = ['--monotonic', '--boottime'].map((clock) => `${clock}=${seconds}`);
      const wrapper = ['unshare', '--map-root-user', '--time', ...offset, '--fork', '--kill-child'];
      const arrived = await spawn({ at: there, wrapper }).begin(emptyRun());
      const client = arrived.connect('tpm');
      const after = clockOf(await client.transmit(readClock()));
      const minute = 60_000n;
      assert.ok(after.clock >= before.clock && after.clock < before.clock + minute, `${after.clock}`);
      assert.ok(after.time >= before.time && after.time < before.time + minute, `${after.time}`);
      assert.deepEqual([after.counts, after.safe], [before.counts, before.safe]);
      assert.ok(clockOf(await client.transmit(readClock())).clock >= after.clock);
    });
  }

  it('gives other random numbers wherever it goes on', async () => {
    await spawn().begin(run);
    await freeze();
    const other = new MiniManager();
    for (const one of [there, other]) one.saves.push(...manager.saves);
    const randoms = new Set<string>();
    for (const at of [manager, there, other]) {
      const worker = await spawn({ at }).begin(emptyRun());
      randoms.add((await worker.connect('tpm').transmit(getRandom())).toString('hex'));
      await worker.kill();
    }
    other.stop();
    assert.equal(randoms.size, 3);
  });

  it('answers nothing where it goes on before that is durable', async () => {
    const worker = await spawn().begin(run);
    await measured(worker.connectKept(run).client);
    await freeze();
    move();
    there.holdSaves = true;
    const saved = there.next('SAVE');
    const arriving = spawn({ at: there });
    const isServing = arriving.begin(emptyRun());
    await saved;
    assert.ok(!arriving.messages.some(({ type }) => type === 'serving'));
    there.release();
    await isServing;
    await expectMeasured(arriving.connect('tpm'));
  });

  it('does not go on in another run of the VM: that is a power-on', async () => {
    const worker = await spawn().begin(run);
    await measured(worker.connectKept(run).client);
    await freeze();
    move();
    const client = (await spawn({ at: there }).begin(newRun())).connect('tpm');
    assert.ok(uses(there).includes('DROP'));
    assert.deepEqual((await client.transmit(pcrRead(PCR))).subarray(-32), Buffer.alloc(32));
    assert.equal(counterOf(await client.transmit(nvReadCounter(INDEX))), 1n);
  });

  it('relieves the TPM of what clients of its tcti door left, and of nothing else', async () => {
    const worker = await spawn().begin(run);
    const tpm = worker.connectKept(run);
    const tcti = worker.connect('tcti', 4711);
    await tpm.client.transmit(createPrimaryRsa());
    for (const command of [createPrimaryRsa(2048, randomBytes(32)), startAuthSession()]) {
      assert.equal(responseCode(await tcti.transmit(command)), 0);
    }
    const loaded = async (client: TpmClient) =>
      Promise.all(
        [TRANSIENT, LOADED_SESSIONS].map(async (first) =>
          handlesOf(await client.transmit(getHandles(first))),
        ),
      );
    const [objects, sessions] = await loaded(tpm.client);
    assert.deepEqual([objects!.length, sessions!.length], [2, 1]);
    await freeze();
    move();
    const arrived = await arrive();
    assert.deepEqual(await loaded(arrived.connect('tpm')), [[TRANSIENT], []]);
  });

  it('goes on by itself on the next link where the one is lost that it was frozen over', async () => {
    const worker = await spawn().begin(run);
    const { client } = worker.connectKept(run);
    await measured(client);
    await freeze();
    client.send(nvIncrement(INDEX));
    manager.cut();
    await worker.heard('link-lost');
    await worker.turn();
    assert.equal(client.received.length, 0);
    worker.relink();
    assert.equal(responseCode(await client.response()), 0);
    assert.deepEqual(uses().slice(-3), ['SUSPEND', 'TAKE_BACK', undefined]);
  });

  it('says nothing of a freeze that ended with its link', async () => {
    const worker = await spawn().begin(run);
    const { client } = worker.connectKept(run);
    await measured(client);
    manager.holdSaves = true;
    const saved = manager.next('SAVE');
    manager.send('FREEZE', true);
    await saved;
    manager.cut();
    await worker.heard('link-lost');
    manager.holdSaves = false;
    const isTakenBack = manager
      .next('RESUME')
      .then(() => manager.next('SAVE'))
      .then(() => manager.next('SAVE'));
    worker.relink();
    await isTakenBack;
    await expectMeasured(client);
    assert.deepEqual(uses().slice(-2), ['SUSPEND', 'TAKE_BACK']);
    assert.ok(!manager.received.includes('FROZEN'));
  });

  it('I-3: does not go on where another one has the TPM by then', async () => {
    const { worker, client } = await thawing();
    manager.fence('migrating');
    assert.equal((await worker.heard('failed')).reason, 'migrating');
    await worker.exited;
    assert.equal(client.received.length, 0);
  });

  it('is answered again where it is asked again, and stops as it was frozen', async () => {
    const worker = await spawn().begin(run);
    await measured(worker.connectKept(run).client);
    await freeze();
    const count = manager.saves.length;
    await freeze();
    worker.send({ type: 'stop' });
    assert.deepEqual(await worker.exited, { code: 0, signal: null });
    assert.equal(manager.saves.length, count, 'no Shutdown');
    move();
    await expectMeasured((await arrive()).connect('tpm'));
  });

  it('has nothing to suspend where its VMM has powered the TPM off', async () => {
    const off = newRun('vmm');
    await spawn().begin(off, 'none');
    const count = manager.saves.length;
    await freeze();
    assert.equal(manager.saves.length, count);
    move();
    const arrived = spawn({ at: there });
    await arrived.begin(newRun('vmm'), 'none');
    const client = arrived.connect('tpm');
    assert.equal(responseCode(await client.transmit(getRandom())), 0x101, 'it is off');
  });
});
