import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { referenceDigest } from 'vtpmd/state-blob/reference';
import { MiniManager } from '../support/mini-manager.js';
import { getRandom, pcrExtend, pcrRead, readClock } from '../support/tpm-commands.js';
import { u32, Vmm } from '../support/vmm.js';
import { type KeptGuest, KeptRun, makeKept, WorkerProcess } from '../support/worker-process.js';

const STARTUP_CLEAR = '80010000000c000001440000';
const FAILURE = '80010000000a00000101';
const SUCCESS = 0;
const FAIL = 9;
const BAD_ORDINAL = 0x0a;
const RETRY = 0x800;
const PERMANENT = 1;
const VOLATILE = 2;
const SAVESTATE = 3;

const pcrOf = (answer: Buffer): string => answer.subarray(-32).toString('hex');
/** u32 resetCount of TPM2_ReadClock. */
const resets = (answer: Buffer): number => answer.readUInt32BE(10 + 16);

/** A VM with its vTPM on one host. */
class Host {
  readonly manager = new MiniManager();
  readonly run = new KeptRun('vmm');
  readonly control: KeptGuest;
  readonly vmm: Vmm;
  readonly workers: WorkerProcess[] = [];

  constructor() {
    this.run.startup = 'none';
    this.control = makeKept(this.run, 'control');
    this.vmm = new Vmm(this.control.client);
  }

  worker(options?: { nodeArguments: string[] }): WorkerProcess {
    const worker = new WorkerProcess(this.manager, options);
    this.workers.push(worker);
    return worker;
  }

  async destroy(): Promise<void> {
    this.vmm.close();
    for (const worker of this.workers) await worker.kill();
    this.manager.stop();
    this.run.close();
  }
}

describe('a worker that stands in for a TPM', () => {
  let source: Host;
  /** Of PCR 9, which the guest has extended. */
  let pcr: string;
  let resetCount: number;
  let blob: Buffer;
  let tcti: KeptGuest;

  async function takeOut(vmm: Vmm, type: number): Promise<Buffer> {
    const taken = await vmm.getBlob(type);
    assert.ok(Buffer.isBuffer(taken), `GET_STATEBLOB ${type}: ${taken}`);
    return taken;
  }

  beforeEach(async () => {
    source = new Host();
    const { run, vmm } = source;
    const worker = await source.worker().begin(run, 'none');
    worker.passKept([source.control]);
    tcti = worker.connectKept(run, 'tcti');
    assert.equal(await vmm.powerOn(0xf80), SUCCESS);
    await vmm.data!.transmit(STARTUP_CLEAR);
    await vmm.data!.transmit(pcrExtend(9, randomBytes(32)));
    pcr = pcrOf(await vmm.data!.transmit(pcrRead(9)));
    resetCount = resets(await vmm.data!.transmit(readClock()));
    blob = await takeOut(vmm, PERMANENT);
    // The state leaves: nothing of it can run here any more.
    await worker.kill();
  });
  afterEach(() => source.destroy());

  describe('at the host that it leaves', () => {
    let standIn: WorkerProcess;

    const away = (outage?: object): Promise<WorkerProcess> =>
      source.worker().standIn(source.run, 'away', [source.control], { ...(outage && { outage }) });
    const everyone = (): KeptGuest[] => [source.control, tcti];
    /** The destination gave it back. */
    const comesBack = async (worker = standIn): Promise<void> => {
      assert.equal((await worker.goOn(source.run, everyone())).type, 'serving', worker.log);
    };
    const lastUse = () => source.manager.saves.at(-1)?.use?.action;

    it('gives what the VMM has not taken out yet, the same each time, and asks for nothing', async () => {
      const { vmm } = source;
      // QEMU is between its requests when the worker ends.
      const asked = vmm.getBlob(VOLATILE);
      standIn = await away();
      const volatile = await asked;
      assert.ok(Buffer.isBuffer(volatile) && volatile.length === blob.length);
      assert.equal(await vmm.getBlob(SAVESTATE), RETRY);
      assert.deepEqual(await takeOut(vmm, PERMANENT), blob);
      assert.equal(await vmm.ask('GET_CAPABILITY'), '000000000001ffff');
      await standIn.kill();
      // One that is killed is followed by another.
      standIn = await away();
      assert.deepEqual(await takeOut(vmm, VOLATILE), volatile);
      assert.ok(!standIn.messages.some(({ type }) => type === 'vmm-calls'));
      await comesBack();
      assert.equal(lastUse(), 'SUSPEND', 'nobody wanted it back');
    });

    it('asks for the TPM where the VM goes on, and LOCK_STORAGE is done when it is back', async () => {
      const { vmm } = source;
      standIn = await away();
      const locked = vmm.result('LOCK_STORAGE', u32(300));
      const { request } = await standIn.heard('vmm-calls');
      assert.equal(request, 'LOCK_STORAGE');
      // The same process, with an identity.
      await comesBack();
      assert.equal(await locked, SUCCESS);
      assert.equal(lastUse(), 'TAKE_BACK');
      assert.equal(pcrOf(await vmm.data!.transmit(pcrRead(9))), pcr);
      assert.equal(resets(await vmm.data!.transmit(readClock())), resetCount);
    });

    it("holds a guest's command in its socket until the TPM is back, and those of other doors too", async () => {
      const { vmm } = source;
      standIn = await away();
      const read = vmm.data!.transmit(pcrRead(9));
      const other = tcti.client.transmit(getRandom());
      const { request } = await standIn.heard('vmm-calls');
      assert.equal(request, 'command');
      // It is said until somebody does something.
      await standIn.next('vmm-calls');
      await standIn.kill();
      // By another process.
      await comesBack(source.worker());
      assert.equal(pcrOf(await read), pcr);
      assert.equal((await other).readUInt32BE(6), SUCCESS);
      assert.equal(lastUse(), 'TAKE_BACK');
    });

    it('answers STOP at once; INIT asks for the TPM, which begins anew', async () => {
      const { vmm } = source;
      standIn = await away();
      assert.equal(await vmm.result('STOP'), SUCCESS);
      assert.equal((await vmm.data!.transmit(getRandom())).toString('hex'), FAILURE);
      assert.equal(await vmm.result('GET_STATEBLOB', u32(1, PERMANENT, 0)), BAD_ORDINAL);
      const init = vmm.result('INIT', u32(0));
      await standIn.heard('vmm-calls');
      await comesBack();
      assert.equal(await init, SUCCESS);
      assert.equal(lastUse(), 'DROP');
      await vmm.data!.transmit(STARTUP_CLEAR);
      assert.equal(pcrOf(await vmm.data!.transmit(pcrRead(9))), '00'.repeat(32));
    });

    it('takes the reference back in where the VM begins here again', async () => {
      const { vmm } = source;
      standIn = await away();
      const volatile = await takeOut(vmm, VOLATILE);
      assert.equal(await vmm.result('STOP'), SUCCESS);
      const set = vmm.setBlob(PERMANENT, blob);
      assert.equal((await standIn.heard('vmm-calls')).request, 'SET_STATEBLOB');
      await comesBack();
      assert.equal(await set, SUCCESS);
      assert.equal(await vmm.setBlob(VOLATILE, volatile), SUCCESS);
      assert.equal(await vmm.result('INIT', u32(1)), SUCCESS);
      assert.equal(lastUse(), 'RESTORE');
      assert.equal(pcrOf(await vmm.data!.transmit(pcrRead(9))), pcr);
    });

    it('refuses what waits where the TPM does not come back', async () => {
      const { vmm } = source;
      standIn = await away();
      const locked = vmm.result('LOCK_STORAGE', u32(300));
      await standIn.heard('vmm-calls');
      standIn.send({ type: 'no-tpm', message: 'it lives at another host' });
      assert.equal(await locked, FAIL);
    });

    it('lets no VMM stand still for ever: a request waits for its time, and asks again when it comes again', async () => {
      const { vmm } = source;
      standIn = await away({ holdMs: { power: 20 } });
      assert.equal(await vmm.result('LOCK_STORAGE', u32(300)), FAIL);
      const calls = standIn.messages.filter(({ type }) => type === 'vmm-calls').length;
      const again = standIn.next('vmm-calls');
      const read = vmm.data!.transmit(pcrRead(9));
      assert.ok(calls >= 1);
      await again;
      await comesBack();
      assert.equal(pcrOf(await read), pcr);
    });
  });

  describe('at the host that it comes to', () => {
    let destination: Host;
    let volatile: Buffer;
    let standIn: WorkerProcess;
    let directory: string;

    beforeEach(async () => {
      const last = await source.worker().standIn(source.run, 'away', [source.control]);
      volatile = await takeOut(source.vmm, VOLATILE);
      await last.kill();
      destination = new Host();
      source.manager.moveTo(destination.manager);
      directory = mkdtempSync(join(tmpdir(), 'vtpm-stand-in-'));
      standIn = await incoming();
    });
    afterEach(async () => {
      await destination.destroy();
      rmSync(directory, { recursive: true, force: true });
    });

    const incoming = (refused?: string, options?: { nodeArguments: string[] }): Promise<WorkerProcess> =>
      destination
        .worker(options)
        .standIn(destination.run, 'incoming', [destination.control], { ...(refused && { refused }) });
    /** As QEMU does with `-incoming`, up to INIT. */
    async function connect(): Promise<void> {
      const { vmm } = destination;
      assert.equal(await vmm.setDataFd(), SUCCESS);
      // No command runs: this is how QEMU asks which TPM it is.
      assert.equal((await vmm.data!.transmit('80010000000a00000181')).toString('hex'), FAILURE);
      assert.equal(await vmm.ask('GET_CAPABILITY'), '000000000001ffff');
      assert.equal(await vmm.ask('STOP'), '00000000');
      assert.equal(await vmm.ask('SET_BUFFERSIZE', u32(0xf80)), '0000000000000f8000000af800001000');
      assert.equal(await vmm.ask('STOP'), '00000000');
    }
    async function bringIn(permanent = blob): Promise<void> {
      assert.equal(await destination.vmm.setBlob(PERMANENT, permanent), SUCCESS);
      assert.equal(await destination.vmm.setBlob(VOLATILE, volatile), SUCCESS);
    }
    async function isAsItWas(): Promise<void> {
      const { vmm, manager } = destination;
      assert.equal(manager.saves.at(-1)?.use?.action, 'RESTORE');
      assert.equal(pcrOf(await vmm.data!.transmit(pcrRead(9))), pcr);
      assert.equal(resets(await vmm.data!.transmit(readClock())), resetCount);
    }

    it('serves the VMM before there is a TPM, and takes that over with the INIT that needs it', async () => {
      const { vmm, manager, run } = destination;
      await connect();
      await bringIn();
      const init = vmm.result('INIT', u32(1));
      const { request, referenceDigest: digest, bufferSize } = await standIn.heard('vmm-calls');
      assert.deepEqual([request, bufferSize], ['INIT', 0xf80]);
      assert.equal(digest, referenceDigest(blob.subarray(80, 112)).toString('hex'));
      assert.equal(manager.epoch, 0n, 'nothing is decided before somebody says so');
      assert.equal((await standIn.arrive(run, [destination.control])).type, 'serving', standIn.log);
      assert.equal(await init, SUCCESS);
      assert.equal(manager.epoch, 1n);
      await isAsItWas();
      // It is a vTPM as any other from here on.
      await standIn.kill();
      const next = destination.worker();
      assert.equal((await next.goOn(run, [destination.control])).type, 'serving');
      await vmm.data!.transmit(pcrExtend(9, randomBytes(32)));
    });

    it('refuses INIT without the reference, and with half of it, and asks nobody', async () => {
      const { vmm } = destination;
      await connect();
      assert.equal(await vmm.result('INIT', u32(1)), FAIL);
      assert.equal(await vmm.setBlob(PERMANENT, blob), SUCCESS);
      assert.equal(await vmm.result('INIT', u32(1)), FAIL);
      const otherHalf = Buffer.from(volatile);
      otherHalf.fill(7, 80, 112);
      assert.equal(await vmm.setBlob(VOLATILE, otherHalf), SUCCESS);
      assert.equal(await vmm.result('INIT', u32(1)), FAIL, 'halves of two references');
      assert.equal(await vmm.result('GET_STATEBLOB', u32(1, PERMANENT, 0)), BAD_ORDINAL);
      assert.equal(await vmm.result('GET_TPMESTABLISHED'), BAD_ORDINAL);
      assert.ok(!standIn.messages.some(({ type }) => type === 'vmm-calls'));
    });

    for (const [what, damaged] of [
      ['state in the clear', () => Buffer.from('0201000a000400000016', 'hex')],
      ['what is cut short', () => blob.subarray(0, 100)],
      ['the other half', () => volatile],
    ] as const) {
      it(`refuses ${what}, and every INIT until the VMM stops the TPM`, async () => {
        const { vmm } = destination;
        await connect();
        assert.notEqual(await vmm.setBlob(PERMANENT, damaged()), SUCCESS);
        assert.notEqual(await vmm.setBlob(PERMANENT, blob), SUCCESS);
        assert.notEqual(await vmm.result('INIT', u32(1)), SUCCESS);
        assert.equal(await vmm.result('STOP'), SUCCESS);
        await bringIn();
        const init = vmm.result('INIT', u32(1));
        await standIn.heard('vmm-calls');
        assert.equal((await standIn.arrive(destination.run, [destination.control])).type, 'serving');
        assert.equal(await init, SUCCESS);
      });
    }

    it('does not take over what the VMM does not mean: another reference decides nothing', async () => {
      const { vmm, manager, run } = destination;
      await connect();
      const other = Buffer.from(blob);
      const otherVolatile = Buffer.from(volatile);
      for (const changed of [other, otherVolatile]) changed.fill(7, 80, 112);
      assert.equal(await vmm.setBlob(PERMANENT, other), SUCCESS);
      assert.equal(await vmm.setBlob(VOLATILE, otherVolatile), SUCCESS);
      const init = vmm.result('INIT', u32(1));
      await standIn.heard('vmm-calls');
      const said = await standIn.arrive(run, [destination.control]);
      assert.deepEqual([said.type, said.reason], ['failed', 'wrong-reference']);
      assert.equal(manager.epoch, 0n);
      // The next one says so, and the right reference is as good as before.
      standIn = await incoming(String(said.message));
      assert.equal(await init, FAIL);
      assert.equal(await vmm.result('INIT', u32(1)), FAIL);
      assert.equal(await vmm.result('STOP'), SUCCESS);
      await bringIn();
      const right = vmm.result('INIT', u32(1));
      await standIn.heard('vmm-calls');
      assert.equal((await standIn.arrive(run, [destination.control])).type, 'serving');
      assert.equal(await right, SUCCESS);
      await isAsItWas();
    });

    for (const at of ['load', 'before-start-save', 'after-start-save', 'control-before-answer']) {
      it(`loses nothing where its worker is killed at ${at}`, async () => {
        const prelude = join(directory, 'prelude.cjs');
        writeFileSync(
          prelude,
          `globalThis[Symbol.for('vtpm.barrier')] = (name) => {
            if (name === ${JSON.stringify(at)} && globalThis.isArmed) process.kill(process.pid, 'SIGKILL');
            if (name === 'control-before-act') globalThis.acts = (globalThis.acts ?? 0) + 1;
            if (globalThis.acts >= 8) globalThis.isArmed = true;
          };`,
        );
        const { vmm, run } = destination;
        await standIn.kill();
        standIn = await incoming(undefined, { nodeArguments: ['--require', prelude] });
        await connect();
        await bringIn();
        const init = vmm.result('INIT', u32(1));
        await standIn.heard('vmm-calls');
        const served = standIn.arrive(run, [destination.control]);
        if (at === 'load') {
          await destination.manager.loaded;
          await standIn.kill();
          // It is loaded, and this process never said so: the next one arrives again.
          const next = destination.worker();
          assert.equal((await next.arrive(run, [destination.control])).type, 'serving', next.log);
        } else {
          await served;
          await standIn.exited;
          const next = destination.worker();
          assert.equal((await next.goOn(run, [destination.control])).type, 'serving', next.log);
        }
        assert.equal(await init, SUCCESS);
        await isAsItWas();
      });
    }
  });
});
