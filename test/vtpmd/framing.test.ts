import assert from 'node:assert/strict';
import fc from 'fast-check';
import { CHECKPOINT_LAYOUT } from 'vtpm-common/checkpoint-layout';
import { frame, framedResponse, transmitFramed } from '../support/framed.js';
import { MiniManager } from '../support/mini-manager.js';
import {
  createPrimaryRsa,
  flushContext,
  getRandom,
  nvDefineCounter,
  nvIncrement,
  pcrExtend,
  pcrRead,
  responseCode,
} from '../support/tpm-commands.js';
import { until } from '../support/until.js';
import { KeptRun, WorkerProcess } from '../support/worker-process.js';

const COUNTER = 0x01500002;
const TPM_RC_COMMAND_SIZE = 0x142;
const TPM_RC_LOCALITY = 0x907;
const FAILURE = '80010000000a00000101';

for (const isKept of [false, true])
  describe(`worker: commands in TCG frames, ${isKept ? 'with' : 'without'} checkpoints`, () => {
    const run = new KeptRun();
    let manager: MiniManager;
    let worker: WorkerProcess;

    before(async () => {
      manager = new MiniManager();
      worker = new WorkerProcess(manager);
      await (isKept ? worker.begin(run) : worker.serve());
    });
    after(async () => {
      await worker.kill();
      manager.stop();
      run.close();
    });

    it('are answered in a frame, each like its bare sister, in whatever order they come', async () => {
      const client = worker.connect('tpm');
      const kinds = fc.array(fc.record({ isFramed: fc.boolean(), size: fc.integer({ min: 1, max: 32 }) }));
      await fc.assert(
        fc.asyncProperty(kinds, async (sent) => {
          const bytes = sent.map(({ isFramed, size }) =>
            isFramed ? frame(getRandom(size)) : getRandom(size),
          );
          client.send(Buffer.concat(bytes));
          for (const { isFramed, size } of sent) {
            const response = isFramed ? await framedResponse(client) : await client.response();
            assert.deepEqual([response.length, response.readUInt16BE(10)], [12 + size, size]);
          }
        }),
        { numRuns: 40 },
      );
      client.close();
    });

    it('are put together from single bytes', async () => {
      const client = worker.connect('tpm');
      for (const byte of frame(getRandom(7))) {
        await new Promise<void>((resolve) => client.socket.write(Buffer.of(byte), () => resolve()));
      }
      assert.equal((await framedResponse(client)).readUInt16BE(10), 7);
      client.close();
    });

    it('may be slow ones', async () => {
      const client = worker.connect('tpm');
      const made = await transmitFramed(client, createPrimaryRsa());
      assert.equal(responseCode(made), 0);
      assert.equal(responseCode(await client.transmit(flushContext(made.readUInt32BE(10)))), 0);
      client.close();
    });

    for (const door of ['tpm', 'tcti'] as const)
      it(`do not run at another locality than the door ${door} has`, async () => {
        const client = worker.connect(door);
        const value = async () => (await client.transmit(pcrRead(16))).subarray(-32).toString('hex');
        const before = await value();
        for (const locality of [1, 2, 3, 4, 5, 255]) {
          const refused = await transmitFramed(client, pcrExtend(16, Buffer.alloc(32, 1)), locality);
          assert.equal(responseCode(refused), TPM_RC_LOCALITY);
          assert.equal(refused.length, 10);
        }
        assert.equal(await value(), before);
        assert.equal(responseCode(await transmitFramed(client, pcrExtend(16, Buffer.alloc(32, 1)))), 0);
        assert.notEqual(await value(), before);
        client.close();
      });

    it('I-10: of a length that no command has are answered with TPM_RC_COMMAND_SIZE, and the connection closes', async () => {
      for (const length of [0, 9, 4097, 0xffffffff]) {
        const client = worker.connect('tpm');
        client.send(Buffer.concat([frame(getRandom(1)), frame(getRandom(), 0, length), frame(getRandom())]));
        assert.equal(responseCode(await framedResponse(client)), 0);
        assert.equal(responseCode(await framedResponse(client)), TPM_RC_COMMAND_SIZE);
        await client.ended;
        assert.equal(client.received.length, 0);
      }
      // The length of the frame is right, and the command in it lies: the frame says where the next one begins.
      const client = worker.connect('tpm');
      const lying = getRandom();
      lying.writeUInt32BE(4096, 2);
      assert.equal(responseCode(await transmitFramed(client, lying)), TPM_RC_COMMAND_SIZE);
      assert.equal(responseCode(await transmitFramed(client, getRandom())), 0);
      client.close();
    });

    it('fail in a frame where they were being answered and the TPM is lost', async () => {
      const lost = new KeptRun();
      const lostManager = new MiniManager();
      const workers = [new WorkerProcess(lostManager)];
      try {
        await workers[0]!.begin(lost, 'clear', undefined, isKept);
        const guests = [workers[0]!.connectKept(lost), workers[0]!.connectKept(lost, 'tcti')];
        const [framedGuest, bareGuest] = guests.map(({ client }) => client);
        assert.equal(responseCode(await transmitFramed(framedGuest!, nvDefineCounter(COUNTER))), 0);
        lostManager.holdSaves = true;
        const saving = lostManager.next('SAVE');
        framedGuest!.send(frame(nvIncrement(COUNTER)));
        await saving;
        bareGuest!.send(getRandom());
        // Without checkpoints the worker has taken it from the socket, and must have noted that.
        const isNoted = () => lost.image().readUInt32LE(CHECKPOINT_LAYOUT.taken + 4) === guests[1]!.id;
        await until('the second command waits', () => isKept || isNoted());
        await workers[0]!.kill();
        workers.push(new WorkerProcess(lostManager));
        await workers[1]!.beLost(lost, guests);
        assert.equal((await framedResponse(framedGuest!)).toString('hex'), FAILURE);
        assert.equal((await transmitFramed(framedGuest!, getRandom())).toString('hex'), FAILURE);
        assert.equal((await bareGuest!.response()).toString('hex'), FAILURE);
        for (const { client } of guests) client.close();
      } finally {
        for (const one of workers) await one.kill();
        lostManager.stop();
        lost.close();
      }
    });
  });
