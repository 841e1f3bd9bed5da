import assert from 'node:assert/strict';
import { createHash, randomBytes } from 'node:crypto';
import { closeSync, readdirSync, writeSync } from 'node:fs';
import { Socket } from 'node:net';
import { fcntl, pipePair, sendDescriptor, socketFd, socketPair } from 'vtpm-common/libc';
import { MiniManager } from '../support/mini-manager.js';
import { TpmClient } from '../support/tpm-client.js';
import {
  createPrimaryRsa,
  getRandom,
  lockoutCounter,
  lockoutCounterOf,
  nvDefineCounter,
  nvDefineSecret,
  nvReadSecret,
  pcrExtend,
  pcrRead,
  readClock,
} from '../support/tpm-commands.js';
import { CMD, type ControlCommand, request, u32, Vmm } from '../support/vmm.js';
import { KeptRun, WorkerProcess } from '../support/worker-process.js';

const STARTUP_CLEAR = '80010000000c000001440000';
const STARTUP_STATE = '80010000000c000001440001';
const SHUTDOWN_STATE = '80010000000c000001450001';
const FAILURE = '80010000000a00000101';
const SUCCESS = 0;
const BAD_PARAMETER = 3;
const BAD_ORDINAL = 0x0a;
const IO_ERROR = 0x1f;
const BAD_LOCALITY = 0x3d;
const F_SETFL = 4;
const INDEX = 0x01500001;
const ZERO = '00'.repeat(32);
const ONES = 'ff'.repeat(32);

const code = (answer: Buffer): number => answer.readUInt32BE(6);
const pcrOf = (answer: Buffer): string => answer.subarray(-32).toString('hex');
const sha256 = (...parts: Uint8Array[]): Buffer =>
  parts.reduce((hash, part) => hash.update(part), createHash('sha256')).digest();
/** u32 resetCount of TPM2_ReadClock. */
const resets = (answer: Buffer): number => answer.readUInt32BE(10 + 16);

describe('control.sock: a VMM powers its TPM', () => {
  let manager: MiniManager;
  let run: KeptRun;
  let worker: WorkerProcess;
  let vmm: Vmm;

  async function begin(options: { startup?: 'clear' | 'none'; keeps?: boolean; outage?: object } = {}) {
    const { startup = 'none', outage, keeps } = options;
    run = new KeptRun('vmm');
    run.startup = startup;
    worker = await new WorkerProcess(manager).begin(run, startup, outage, keeps);
    vmm = new Vmm(worker.connectKept(run, 'control').client);
  }

  /** The newest one, once it is as it is to be. */
  async function status(isRight: (message: Record<string, unknown>) => boolean) {
    for (;;) {
      const newest = worker.messages.findLast(({ type }) => type === 'vmm');
      if (newest && isRight(newest)) return newest;
      await worker.next('vmm');
    }
  }

  beforeEach(async () => {
    manager = new MiniManager();
    await begin();
  });
  afterEach(async () => {
    vmm.close();
    await worker.kill();
    manager.stop();
    run.close();
  });

  it('answers the first words of QEMU byte by byte', async () => {
    assert.equal(await vmm.setDataFd(), SUCCESS);
    // Before any INIT: whether it is a TPM 2.0.
    assert.equal((await vmm.data!.transmit('80010000000a00000181')).toString('hex'), FAILURE);
    assert.equal(await vmm.ask('GET_CAPABILITY'), '000000000001ffff');
    assert.equal(await vmm.ask('STOP'), '00000000');
    assert.equal(await vmm.ask('SET_BUFFERSIZE', u32(0)), '000000000000100000000af800001000');
    assert.equal(await vmm.ask('SET_BUFFERSIZE', u32(0xf80)), '0000000000000f8000000af800001000');
    assert.equal(await vmm.ask('INIT', u32(0)), '00000000');
    assert.equal(await vmm.ask('GET_TPMESTABLISHED'), '0000000000000000');
    // Padded to four bytes.
    assert.equal(await vmm.ask('SET_LOCALITY', Buffer.alloc(4)), '00000000');
    assert.equal((await vmm.data!.transmit(STARTUP_CLEAR)).toString('hex'), '80010000000a00000000');
    assert.equal(await vmm.ask('GET_CONFIG'), '0000000000000000');
    assert.equal(await vmm.ask('SHUTDOWN'), '00000000');
  });

  it('keeps the buffer size that the VMM chose', async () => {
    await vmm.powerOn(0xb00);
    // TPM_PT_MAX_COMMAND_SIZE
    const property = await vmm.data!.transmit('8001000000160000017a000000060000011e00000001');
    await vmm.data!.transmit(STARTUP_CLEAR);
    const after = await vmm.data!.transmit('8001000000160000017a000000060000011e00000001');
    assert.equal(code(property), 0x100);
    assert.equal(after.readUInt32BE(after.length - 4), 0xb00);
    assert.equal(await vmm.result('SET_BUFFERSIZE', u32(0xc00)), BAD_ORDINAL);
    assert.equal(await vmm.ask('SET_BUFFERSIZE', u32(0)), '0000000000000b0000000af800001000');
  });

  it('resets the TPM: fresh PCRs, the same TPM, no command in between', async () => {
    await vmm.powerOn();
    const { data } = vmm;
    await data!.transmit(STARTUP_CLEAR);
    const tcti = worker.connectKept(run, 'tcti').client;
    await tcti.transmit(pcrExtend(3, randomBytes(32)));
    assert.notEqual(pcrOf(await tcti.transmit(pcrRead(3))), ZERO);
    const key = await data!.transmit(createPrimaryRsa());
    const first = resets(await data!.transmit(readClock()));
    assert.equal(await vmm.ask('STOP'), '00000000');
    for (const door of [data!, tcti])
      assert.equal((await door.transmit(getRandom())).toString('hex'), FAILURE);
    assert.equal(await vmm.ask('INIT', u32(0)), '00000000');
    assert.equal(code(await tcti.transmit(getRandom())), 0x100, 'no Startup yet');
    await data!.transmit(STARTUP_CLEAR);
    assert.equal(pcrOf(await tcti.transmit(pcrRead(3))), ZERO);
    assert.equal(resets(await data!.transmit(readClock())), first + 1);
    const again = await data!.transmit(createPrimaryRsa());
    assert.deepEqual(again.subarray(18, 18 + 280), key.subarray(18, 18 + 280), 'another primary seed');
    tcti.close();
  });

  it('resets with INIT alone, as often as it is asked', async () => {
    await vmm.powerOn();
    for (let count = 0; count < 3; count++) {
      await vmm.data!.transmit(STARTUP_CLEAR);
      await vmm.data!.transmit(pcrExtend(2, randomBytes(32)));
      assert.equal(await vmm.result('INIT', u32(1)), SUCCESS);
      assert.equal(code(await vmm.data!.transmit(getRandom())), 0x100);
    }
  });

  it('sends Shutdown(CLEAR) where the guest sent none', async () => {
    await vmm.powerOn();
    await vmm.data!.transmit(STARTUP_CLEAR);
    const saves = manager.saves.length;
    await vmm.answer('STOP');
    assert.ok(manager.saves.length > saves, 'nothing was saved before the power was cut');
    await vmm.powerOn();
    // TPM2_Startup(STATE) is only for what was shut down with STATE.
    assert.notEqual(code(await vmm.data!.transmit(STARTUP_STATE)), SUCCESS);
  });

  it("leaves a guest's Shutdown(STATE) as it is", async () => {
    await vmm.powerOn();
    await vmm.data!.transmit(STARTUP_CLEAR);
    await vmm.data!.transmit(pcrExtend(1, randomBytes(32)));
    const before = pcrOf(await vmm.data!.transmit(pcrRead(1)));
    await vmm.data!.transmit(SHUTDOWN_STATE);
    assert.equal(code(await vmm.data!.transmit(getRandom())), SUCCESS);
    await vmm.answer('STOP');
    await vmm.answer('INIT', u32(0));
    assert.equal(code(await vmm.data!.transmit(STARTUP_STATE)), SUCCESS);
    assert.equal(pcrOf(await vmm.data!.transmit(pcrRead(1))), before);
  });

  it('starts the TPM up itself where the vTPM says so', async () => {
    vmm.close();
    await worker.kill();
    await begin({ startup: 'clear' });
    await vmm.powerOn();
    assert.equal(code(await vmm.data!.transmit(getRandom())), SUCCESS);
    // Cloud Hypervisor sends its own, and takes this answer.
    assert.equal(code(await vmm.data!.transmit(STARTUP_CLEAR)), 0x100);
  });

  it('measures a dynamic root of trust into PCR 17', async () => {
    await vmm.powerOn();
    await vmm.data!.transmit(STARTUP_CLEAR);
    assert.equal(pcrOf(await vmm.data!.transmit(pcrRead(17))), ONES);
    assert.equal(await vmm.ask('GET_TPMESTABLISHED'), '0000000000000000');
    const content = randomBytes(5000);
    assert.equal(await vmm.result('HASH_START'), SUCCESS);
    // What other clients send meanwhile waits: it would end the measurement.
    const tcti = worker.connectKept(run, 'tcti').client;
    const waiting = tcti.transmit(getRandom());
    for (const part of [content.subarray(0, 4000), content.subarray(4000)]) {
      assert.equal(await vmm.result('HASH_DATA', Buffer.concat([u32(part.length), part])), SUCCESS);
    }
    assert.equal(await vmm.result('HASH_END'), SUCCESS);
    assert.equal(code(await waiting), SUCCESS);
    const expected = sha256(Buffer.alloc(32), sha256(content)).toString('hex');
    assert.equal(pcrOf(await vmm.data!.transmit(pcrRead(17))), expected);
    assert.equal(await vmm.ask('GET_TPMESTABLISHED'), '0000000001000000');
    assert.equal(await vmm.result('RESET_TPMESTABLISHED', Buffer.from([2])), BAD_LOCALITY);
    assert.equal(await vmm.result('RESET_TPMESTABLISHED', Buffer.from([3, 0, 0, 0])), SUCCESS);
    assert.equal(await vmm.ask('GET_TPMESTABLISHED'), '0000000000000000');
    tcti.close();
  });

  it("runs a guest's commands at the locality that the VMM says, and nobody else's", async () => {
    await vmm.powerOn();
    await vmm.data!.transmit(STARTUP_CLEAR);
    // PCR 20 can be extended from locality 1 on, PCR 17 from 2 on (TPM 2.0 library part 1, PC client profile).
    const extend = pcrExtend(20, randomBytes(32));
    assert.notEqual(code(await vmm.data!.transmit(extend)), SUCCESS);
    assert.equal(await vmm.result('SET_LOCALITY', Buffer.from([2])), SUCCESS);
    assert.equal(code(await vmm.data!.transmit(extend)), SUCCESS);
    const tpm = worker.connectKept(run, 'tpm').client;
    assert.notEqual(code(await tpm.transmit(extend)), SUCCESS);
    assert.equal(await vmm.result('SET_LOCALITY', Buffer.from([5])), BAD_LOCALITY);
    tpm.close();
  });

  it('says what libtpms says of itself', async () => {
    const head = await vmm.answer('GET_INFO', Buffer.concat([u32(0, 7, 0, 0)]));
    const [total, length] = [head.readUInt32BE(4), head.readUInt32BE(8)];
    assert.equal(total, length);
    const text = await vmm.control.bytes(length);
    assert.equal(text.at(-1), 0);
    const info = JSON.parse(text.subarray(0, -1).toString()) as { TPMSpecification: { family: string } };
    assert.equal(info.TPMSpecification.family, '2.0');
    const rest = await vmm.answer('GET_INFO', u32(0, 7, 10, 0));
    assert.equal(rest.readUInt32BE(8), length - 10);
    assert.deepEqual(await vmm.control.bytes(length - 10), text.subarray(10));
    assert.equal(await vmm.ask('GET_INFO', u32(0, 7, total, 0)), '000000030000000000000000');
  });

  it('answers while the TPM makes an RSA key, and cuts the power when it is made', async () => {
    await vmm.powerOn();
    await vmm.data!.transmit(STARTUP_CLEAR);
    let isMade = false;
    const making = vmm.data!.transmit(createPrimaryRsa()).then((answer) => {
      isMade = true;
      return answer;
    });
    assert.equal(await vmm.result('SET_LOCALITY', Buffer.from([0])), SUCCESS);
    for (const command of ['GET_CAPABILITY', 'GET_TPMESTABLISHED', 'GET_CONFIG'] as const) {
      assert.equal(await vmm.result(command), SUCCESS);
      assert.equal(isMade, false, `${command} waited for the key`);
    }
    assert.equal(await vmm.result('CANCEL_TPM_CMD'), SUCCESS);
    assert.equal(await vmm.result('STOP'), SUCCESS);
    assert.ok([SUCCESS, 0x909].includes(code(await making)));
  });

  it('has one data channel at a time, which ends with its VMM', async () => {
    assert.equal(await vmm.setDataFd(), SUCCESS);
    const { data } = vmm;
    assert.equal(await vmm.setDataFd(), IO_ERROR);
    assert.equal(await vmm.result('SET_DATAFD'), BAD_PARAMETER);
    vmm.control.close();
    await data!.ended;
    vmm = new Vmm(worker.connectKept(run, 'control').client);
    assert.equal(await vmm.powerOn(), SUCCESS);
  });

  it('takes the data channel of the next VMM when a command of the one before it is done', async () => {
    await vmm.powerOn();
    await vmm.data!.transmit(STARTUP_CLEAR);
    manager.holdSaves = true;
    const saving = manager.next('SAVE');
    vmm.data!.send(nvDefineCounter(0x01500001));
    await saving;
    vmm.close();
    vmm = new Vmm(worker.connectKept(run, 'control').client);
    assert.equal(await vmm.result('GET_CONFIG'), SUCCESS);
    const given = vmm.setDataFd();
    // Behind that: the worker has read it.
    await worker.connectKept(run, 'control').client.ended;
    manager.release();
    assert.equal(await given, SUCCESS);
    assert.equal(code(await vmm.data!.transmit(getRandom())), SUCCESS);
  });

  it('takes it, too, where a command of the one before it waits for the end of a measurement', async () => {
    await vmm.powerOn();
    await vmm.data!.transmit(STARTUP_CLEAR);
    assert.equal(await vmm.result('HASH_START'), SUCCESS);
    vmm.data!.send(getRandom());
    assert.equal(await vmm.result('GET_CONFIG'), SUCCESS);
    vmm.close();
    vmm = new Vmm(worker.connectKept(run, 'control').client);
    assert.equal(await vmm.powerOn(), SUCCESS);
    assert.equal(code(await vmm.data!.transmit(STARTUP_CLEAR)), SUCCESS);
  });

  it('refuses a second VMM, and takes the next one when the first is gone', async () => {
    assert.equal(await vmm.powerOn(), SUCCESS);
    await vmm.data!.transmit(STARTUP_CLEAR);
    const second = worker.connectKept(run, 'control').client;
    await second.ended;
    assert.equal(await vmm.result('GET_CONFIG'), SUCCESS);
    // Each of swtpm's tools connects for itself: the TPM stays on between them.
    for (let count = 0; count < 10; count++) {
      vmm.close();
      vmm = new Vmm(worker.connectKept(run, 'control').client);
      assert.equal(await vmm.result('GET_TPMESTABLISHED'), SUCCESS);
    }
    await status(({ connected, power }) => connected === true && power === 'on');
  });

  it('does what a VMM asked for that is gone already', async () => {
    await vmm.powerOn();
    await status(({ connected, power }) => connected === true && power === 'on');
    worker.child.kill('SIGSTOP');
    // The worker hears of the next VMM first.
    const second = worker.connectKept(run, 'control').client;
    vmm.control.send(request('STOP'));
    vmm.close();
    worker.child.kill('SIGCONT');
    await second.ended;
    assert.equal((await status(({ connected }) => connected === false)).power, 'off');
  });

  it('tells what the VMM does', async () => {
    assert.equal(await vmm.powerOn(0xf80), SUCCESS);
    await vmm.answer('SET_LOCALITY', Buffer.from([3]));
    const expected = { type: 'vmm', connected: true, power: 'on', bufferSize: 0xf80, locality: 3 };
    assert.deepEqual(await status(({ locality }) => locality === 3), expected);
  });

  it('closes every descriptor that it did not ask for', async () => {
    assert.equal(await vmm.setDataFd(), SUCCESS);
    const count = (): number => readdirSync(`/proc/${worker.child.pid}/fd`).length;
    const before = count();
    for (let round = 0; round < 20; round++) {
      assert.equal(await vmm.askWithStray('GET_CAPABILITY'), '000000000001ffff');
      assert.equal(await vmm.askWithStray('SET_DATAFD'), '0000001f');
      assert.equal(await vmm.askWithStray('SET_LOCALITY', Buffer.alloc(4)), '00000000');
    }
    assert.equal(count(), before);
  });

  describe('while the manager is away', () => {
    const HOLD = { holdMs: { power: 200 } };
    const FAIL = 9;

    beforeEach(async () => {
      vmm.close();
      await worker.kill();
      await begin({ outage: HOLD });
    });

    async function away(): Promise<void> {
      const lost = worker.next('link-lost');
      manager.cut();
      await lost;
    }

    it('no VM powers on: INIT waits and fails, and works when it is back', async () => {
      await away();
      assert.equal(await vmm.powerOn(), FAIL);
      assert.equal(await vmm.result('GET_TPMESTABLISHED'), BAD_ORDINAL);
      assert.equal((await vmm.data!.transmit(STARTUP_CLEAR)).toString('hex'), FAILURE);
      const up = worker.next('link-up');
      worker.relink();
      await up;
      assert.equal(await vmm.result('INIT', u32(0)), SUCCESS);
      assert.equal(code(await vmm.data!.transmit(STARTUP_CLEAR)), SUCCESS);
    });

    it('INIT goes on where it comes back in time', async () => {
      vmm.close();
      await worker.kill();
      await begin({ outage: { holdMs: { power: 60_000 } } });
      await away();
      const powered = vmm.powerOn();
      assert.equal(await Promise.race([powered, vmm.control.ended.then(() => 'ended'), tick()]), 'waits');
      worker.relink();
      assert.equal(await powered, SUCCESS);
    });

    it('the power is cut at once, and the Shutdown is saved with the next power-on', async () => {
      await vmm.powerOn();
      await vmm.data!.transmit(STARTUP_CLEAR);
      await vmm.data!.transmit(pcrExtend(1, randomBytes(32)));
      await away();
      const saves = manager.saves.length;
      assert.equal(await vmm.result('STOP'), SUCCESS);
      assert.equal(await vmm.result('INIT', u32(0)), FAIL);
      assert.equal(manager.saves.length, saves);
      const up = worker.next('link-up');
      worker.relink();
      await up;
      assert.equal(await vmm.result('INIT', u32(0)), SUCCESS);
      assert.equal(manager.saves.length, saves + 1);
    });

    it('a worker that is killed behind a cut leaves a TPM that is off', async () => {
      await vmm.powerOn();
      await vmm.data!.transmit(STARTUP_CLEAR);
      await vmm.data!.transmit(pcrExtend(1, randomBytes(32)));
      await away();
      assert.equal(await vmm.result('INIT', u32(0)), FAIL);
      vmm.close();
      await worker.kill();
      run.dataChannel = undefined;
      worker = new WorkerProcess(manager);
      assert.equal((await worker.goOn(run)).type, 'serving');
      assert.equal((await status(() => true)).power, 'off');
      vmm = new Vmm(worker.connectKept(run, 'control').client);
    });

    it('cutting the power makes no free guesses: a wrong authorisation is counted with the next power-on', async () => {
      vmm.close();
      await worker.kill();
      await begin({ startup: 'clear', outage: { holdMs: { tpm: 20, 'vmm-data': 20 } } });
      assert.equal(await vmm.powerOn(), SUCCESS);
      const data = vmm.data!;
      assert.equal(code(await data.transmit(nvDefineSecret(INDEX, 'right'))), SUCCESS);
      // The first use of such an authorisation after Startup is noted in the TPM before it is checked.
      for (let use = 0; use < 2; use++) await data.transmit(nvReadSecret(INDEX, 'right'));
      const before = lockoutCounterOf(await data.transmit(lockoutCounter()));
      await away();
      data.send(nvReadSecret(INDEX, 'wrong'));
      const other = worker.connectKept(run, 'tpm').client;
      assert.equal(code(await other.transmit(getRandom())), SUCCESS);
      assert.equal(lockoutCounterOf(await other.transmit(lockoutCounter())), before, 'the count is undone');
      assert.equal(data.received.length, 0);
      other.close();
      assert.equal(await vmm.result('STOP'), SUCCESS);
      assert.equal((await data.response()).toString('hex'), FAILURE);
      const up = worker.next('link-up');
      worker.relink();
      await up;
      assert.equal(await vmm.result('INIT', u32(0)), SUCCESS);
      assert.equal(lockoutCounterOf(await data.transmit(lockoutCounter())), before + 1);
    });

    /** Behind what was asked before: the worker has read it. */
    async function tick(): Promise<string> {
      const tpm = worker.connectKept(run, 'tpm').client;
      assert.equal((await tpm.transmit(getRandom())).toString('hex'), FAILURE);
      tpm.close();
      return 'waits';
    }
  });

  describe('I-10 bad input', () => {
    const NEEDS_ON: readonly ControlCommand[] = [
      ...(['GET_TPMESTABLISHED', 'HASH_START', 'HASH_END', 'CANCEL_TPM_CMD', 'STORE_VOLATILE'] as const),
      ...(['RESET_TPMESTABLISHED', 'GET_STATEBLOB'] as const),
    ];

    it('what is not for a TPM that is off is refused, with an answer of full size', async () => {
      for (const command of NEEDS_ON) {
        const body = command === 'GET_STATEBLOB' ? u32(1, 1, 0) : Buffer.alloc(1);
        const answer = await vmm.answer(command, body);
        assert.equal(answer.toString('hex'), `0000000a${'00'.repeat(CMD[command][1] - 4)}`, command);
      }
      await vmm.powerOn();
      assert.equal(
        await vmm.ask('SET_STATEBLOB', Buffer.concat([u32(0, 1, 3), Buffer.alloc(3)])),
        '0000000a',
      );
      assert.equal(await vmm.ask('HASH_END'), '0000000a');
      assert.equal(await vmm.ask('HASH_DATA', u32(0)), '0000000a');
    });

    it('an unknown command is refused, and the next one is heard', async () => {
      for (const unknown of [0, 0x14, 0x7fffffff, 0xffffffff]) {
        vmm.control.send(u32(unknown));
        assert.equal((await vmm.control.bytes(4)).readUInt32BE(0), BAD_ORDINAL);
      }
      assert.equal(await vmm.result('GET_CONFIG'), SUCCESS);
    });

    it('a request that does not come to its end is refused, with an answer of full size', async () => {
      vmm.control.send(Buffer.from([0, 0]));
      assert.equal((await vmm.control.bytes(4)).readUInt32BE(0), BAD_ORDINAL);
      for (const [command, body] of [
        ['INIT', Buffer.alloc(3)],
        ['SET_BUFFERSIZE', Buffer.alloc(1)],
        ['GET_INFO', Buffer.alloc(15)],
        ['HASH_DATA', Buffer.concat([u32(10), Buffer.alloc(9)])],
      ] as const) {
        assert.equal(await vmm.result(command, body), BAD_PARAMETER, command);
      }
      assert.equal(await vmm.result('GET_CONFIG'), SUCCESS);
    });

    it('what pads a request is dropped; an INIT that is longer is refused', async () => {
      assert.equal(await vmm.result('SET_LOCALITY', Buffer.alloc(100)), SUCCESS);
      assert.equal(await vmm.result('STOP', request('INIT', u32(0))), SUCCESS);
      assert.equal(await vmm.result('INIT', Buffer.alloc(8)), BAD_PARAMETER);
      assert.equal(await vmm.result('INIT', u32(2)), BAD_PARAMETER);
      assert.equal(await vmm.result('GET_TPMESTABLISHED'), BAD_ORDINAL, 'it is on');
      assert.equal(await vmm.result('GET_CONFIG', Buffer.alloc(5000)), BAD_PARAMETER);
      await vmm.control.ended;
    });

    it('a state for which there is no room on its way out is refused', async () => {
      vmm.close();
      await worker.kill();
      run = new KeptRun('vmm', 4096);
      run.startup = 'none';
      run.verbs = ['EXPORT'];
      worker = await new WorkerProcess(manager).begin(run, 'none');
      vmm = new Vmm(worker.connectKept(run, 'control').client);
      await vmm.powerOn();
      await vmm.data!.transmit(STARTUP_CLEAR);
      assert.equal(((await vmm.getBlob(1)) as Buffer).length > 1000, true);
      assert.equal(await vmm.getBlob(2), 9);
      assert.equal(await vmm.result('GET_CONFIG'), SUCCESS);
    });

    it('a request in pieces is one request', async () => {
      await vmm.powerOn();
      await vmm.data!.transmit(STARTUP_CLEAR);
      await vmm.result('HASH_START');
      const content = randomBytes(100_000);
      const whole = request('HASH_DATA', Buffer.concat([u32(content.length), content]));
      for (let at = 0; at < whole.length; ) {
        const next = at < 10 ? at + 1 : at + 1 + Math.floor(Math.random() * 40_000);
        vmm.control.send(whole.subarray(at, next));
        await new Promise((resolve) => setImmediate(resolve));
        at = next;
      }
      assert.equal((await vmm.control.bytes(4)).readUInt32BE(0), SUCCESS);
      assert.equal(await vmm.result('HASH_END'), SUCCESS);
      const expected = sha256(Buffer.alloc(32), sha256(content)).toString('hex');
      assert.equal(pcrOf(await vmm.data!.transmit(pcrRead(17))), expected);
    });

    it('as long as a content may be, and not one byte longer', async () => {
      await vmm.powerOn();
      await vmm.data!.transmit(STARTUP_CLEAR);
      await vmm.result('HASH_START');
      const content = randomBytes(512 * 1024);
      assert.equal(await vmm.result('HASH_DATA', Buffer.concat([u32(content.length), content])), SUCCESS);
      assert.equal(await vmm.result('HASH_END'), SUCCESS);
      const expected = sha256(Buffer.alloc(32), sha256(content)).toString('hex');
      assert.equal(pcrOf(await vmm.data!.transmit(pcrRead(17))), expected);
      assert.equal(await vmm.result('HASH_DATA', u32(content.length + 1)), 9);
      await vmm.control.ended;
    });

    it('a VMM that fills the end that it gave, and makes it block, keeps nobody else waiting', async () => {
      const [here, there] = socketPair();
      sendDescriptor(socketFd(vmm.control.socket), there, request('SET_DATAFD'));
      assert.equal((await vmm.control.bytes(4)).readUInt32BE(0), SUCCESS);
      assert.equal(await vmm.result('INIT', u32(0)), SUCCESS);
      const filler = Buffer.alloc(4096);
      assert.throws(() => {
        for (;;) writeSync(there, filler);
      }, /EAGAIN/);
      assert.equal(fcntl(there, F_SETFL, 0), 0);
      writeSync(here, getRandom());
      for (let round = 0; round < 3; round++) {
        const other = worker.connectKept(run, 'tpm').client;
        assert.equal(code(await other.transmit(round === 0 ? STARTUP_CLEAR : getRandom())), SUCCESS);
        other.close();
      }
      for (const end of [here, there]) closeSync(end);
    });

    it('a data channel that is no socket, or two of them, is refused', async () => {
      const [here, there] = socketPair();
      const other = new TpmClient(new Socket({ fd: there }));
      vmm.control.send(Buffer.alloc(0));
      assert.equal(await vmm.result('SET_DATAFD'), BAD_PARAMETER);
      other.close();
      new Socket({ fd: here }).destroy();
      const pipe = pipePair();
      sendDescriptor(socketFd(vmm.control.socket), pipe.read, request('SET_DATAFD'));
      for (const end of [pipe.read, pipe.write]) closeSync(end);
      assert.equal((await vmm.control.bytes(4)).readUInt32BE(0), BAD_PARAMETER);
      assert.equal(await vmm.setDataFd(), SUCCESS);
    });
  });
});
