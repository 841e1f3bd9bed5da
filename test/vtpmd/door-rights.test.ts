import assert from 'node:assert/strict';
import fc from 'fast-check';
import {
  createTpm,
  defineNvIndex,
  NV_Increment,
  NV_Read,
  NvAttribute,
  openSession,
  PolicyGetDigest,
  PolicyLocality,
  permanent,
  Rh,
  readNvIndex,
  withPassword,
  withSession,
} from 'tpm2-ts-bindings';
import { frame, framedResponse, transmitFramed } from '../support/framed.js';
import { MiniManager } from '../support/mini-manager.js';
import type { TpmClient } from '../support/tpm-client.js';
import { getRandom, pcrExtend, responseCode } from '../support/tpm-commands.js';
import { CMD, type ControlCommand, request, u32, Vmm } from '../support/vmm.js';
import { KeptRun, WorkerProcess } from '../support/worker-process.js';

const BAD_ORDINAL = 0x0a;
const FAILURE = 0x101;
const TPM_RC_LOCALITY = 0x907;
const INDEX = 0x01500004;
/** Extended from localities 2 to 4. */
const extendDynamic = () => pcrExtend(17, Buffer.alloc(32, 1));

describe('who may do what at which door', () => {
  let manager: MiniManager;
  let run: KeptRun;
  let worker: WorkerProcess;
  let vmm: Vmm;

  before(async () => {
    manager = new MiniManager();
    run = new KeptRun('vmm');
    run.startup = 'clear';
    worker = await new WorkerProcess(manager).begin(run, 'clear');
    vmm = new Vmm(worker.connectKept(run, 'control').client);
  });
  beforeEach(async () => {
    assert.equal(await vmm.powerOn(), 0);
    assert.equal(await vmm.result('SET_LOCALITY', Buffer.of(0)), 0);
  });
  after(async () => {
    vmm.close();
    await worker.kill();
    manager.stop();
    run.close();
  });

  const code = async (client: TpmClient, command: Buffer) => responseCode(await client.transmit(command));
  const framedCode = async (client: TpmClient, command: Buffer, locality: number) =>
    responseCode(await transmitFramed(client, command, locality));

  const POWER: [ControlCommand, Buffer][] = [
    ['INIT', u32(0)],
    ['STOP', Buffer.alloc(0)],
    ['STORE_VOLATILE', Buffer.alloc(0)],
    ['RESET_TPMESTABLISHED', Buffer.of(3)],
    ['HASH_START', Buffer.alloc(0)],
    ['HASH_END', Buffer.alloc(0)],
    ['SET_BUFFERSIZE', u32(0)],
    ['GET_STATEBLOB', u32(1, 1, 0)],
    ['SET_STATEBLOB', u32(0, 1, 0)],
    ['SET_DATAFD', Buffer.alloc(0)],
    ['SHUTDOWN', Buffer.alloc(0)],
  ];

  it("the TSS's control door powers nothing and gives no state; the VMM's does", async () => {
    const tss = worker.connectKept(run, 'tcti-ctrl').client;
    const tcti = worker.connectKept(run, 'tcti').client;
    for (const [command, body] of POWER) {
      tss.send(request(command, body));
      assert.equal((await tss.bytes(4)).readUInt32BE(0), BAD_ORDINAL, command);
    }
    assert.equal(await code(tcti, getRandom()), 0, 'the TPM is on as before');
    assert.equal(await vmm.result('STOP'), 0);
    assert.equal(await code(tcti, getRandom()), FAILURE);
    for (const [command, body] of [['INIT', u32(0)] as const, ['STOP', Buffer.alloc(0)] as const]) {
      assert.equal(await vmm.result(command, body), 0, command);
    }
    for (const client of [tss, tcti]) client.close();
  });

  it('control requests at a door for commands are no commands', async () => {
    for (const door of ['tpm', 'tcti'] as const) {
      const { client } = worker.connectKept(run, door);
      client.send(Buffer.concat([request('STOP'), Buffer.alloc(12)]));
      // Tag 0 and size 0x0e0000.
      assert.equal(responseCode(await client.response()), 0x1e);
      await worker.closed(client);
      client.close();
    }
    assert.equal(await code(vmm.data!, getRandom()), 0);
    assert.equal(CMD.STOP[0], 0x0e);
  });

  it('the VMM says at which locality its guest is, and a frame of the guest does not', async () => {
    const others = (['tpm', 'tcti'] as const).map((door) => worker.connectKept(run, door).client);
    const data = vmm.data!;
    assert.equal(await code(data, extendDynamic()), TPM_RC_LOCALITY);
    for (const locality of [1, 2, 3, 4]) {
      assert.equal(await framedCode(data, extendDynamic(), locality), TPM_RC_LOCALITY);
    }
    assert.equal(await vmm.result('SET_LOCALITY', Buffer.of(2)), 0);
    assert.equal(await code(data, extendDynamic()), 0);
    assert.equal(await framedCode(data, extendDynamic(), 2), 0);
    for (const locality of [0, 1, 3, 4, 5, 255]) {
      assert.equal(await framedCode(data, extendDynamic(), locality), TPM_RC_LOCALITY);
    }
    for (const other of others) {
      assert.equal(await code(other, extendDynamic()), TPM_RC_LOCALITY);
      assert.equal(await framedCode(other, extendDynamic(), 2), TPM_RC_LOCALITY);
      assert.equal(await framedCode(other, getRandom(), 0), 0);
      other.close();
    }
  });

  it('a policy that wants a locality is satisfied at that one and at no other', async () => {
    const tpm = createTpm({
      transmit: async (command) => Buffer.from(await vmm.data!.transmit(command)),
      close: async () => {},
    });
    const owner = permanent(Rh.OWNER);
    const session = await openSession(tpm, { kind: 'policy' });
    // TPMA_LOCALITY: TPM_LOC_TWO.
    const satisfy = () => tpm.run(PolicyLocality, { policySession: session }, { locality: 4 });
    await satisfy();
    const { policyDigest } = await tpm.run(PolicyGetDigest, { policySession: session }, {});
    const index = await defineNvIndex(tpm, withPassword(owner), {
      nvIndex: INDEX,
      attributes: NvAttribute.OWNERWRITE | NvAttribute.POLICYREAD | NvAttribute.COUNTER | NvAttribute.NO_DA,
      dataSize: 8,
      authPolicy: policyDigest,
    });
    await tpm.run(NV_Increment, { authHandle: withPassword(owner), nvIndex: index }, {});
    const written = await readNvIndex(tpm, INDEX);
    assert.ok(written);
    const read = () =>
      tpm.run(
        NV_Read,
        { authHandle: withSession(written, session), nvIndex: written },
        { size: 8, offset: 0 },
      );
    for (const locality of [0, 1, 3, 4]) {
      assert.equal(await vmm.result('SET_LOCALITY', Buffer.of(locality)), 0);
      await assert.rejects(read(), /TPM_RC_LOCALITY/, `read at ${locality}`);
    }
    assert.equal(await vmm.result('SET_LOCALITY', Buffer.of(2)), 0);
    assert.equal((await read()).data.readBigUInt64BE(), 1n);
  });

  it('several connections to one door take turns, and none gets a byte of another', async () => {
    const turn = fc.record({
      door: fc.constantFrom('tpm' as const, 'tcti' as const),
      sent: fc.array(fc.record({ size: fc.integer({ min: 1, max: 48 }), isFramed: fc.boolean() }), {
        minLength: 1,
        maxLength: 12,
      }),
      /** Where its stream is cut into pieces. */
      cuts: fc.array(fc.integer({ min: 1, max: 40 })),
    });
    const seen = new Set<string>();
    await fc.assert(
      fc.asyncProperty(fc.array(turn, { minLength: 2, maxLength: 6 }), async (turns) => {
        await Promise.all(
          turns.map(async ({ door, sent, cuts }) => {
            const { client } = worker.connectKept(run, door);
            const stream = Buffer.concat(
              sent.map(({ size, isFramed }) => (isFramed ? frame(getRandom(size)) : getRandom(size))),
            );
            let from = 0;
            for (const cut of [...cuts, stream.length]) {
              await new Promise((resolve) => client.socket.write(stream.subarray(from, from + cut), resolve));
              from += cut;
            }
            for (const { size, isFramed } of sent) {
              const response = isFramed ? await framedResponse(client) : await client.response();
              assert.deepEqual([responseCode(response), response.readUInt16BE(10)], [0, size]);
              const text = response.subarray(12).toString('hex');
              if (size > 12) assert.ok(!seen.has(text), 'an answer came twice');
              seen.add(text);
            }
            assert.equal(client.received.length, 0);
            client.close();
          }),
        );
      }),
      { numRuns: 30 },
    );
  });
});
