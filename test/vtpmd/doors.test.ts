import assert from 'node:assert/strict';
import { MiniManager } from '../support/mini-manager.js';
import {
  contextLoad,
  contextSave,
  counterOf,
  createPrimaryEcc,
  createPrimaryRsa,
  flushContext,
  getHandles,
  getRandom,
  handlesOf,
  nvDefineCounter,
  nvIncrement,
  nvReadCounter,
  responseCode,
  startAuthSession,
} from '../support/tpm-commands.js';
import { KeptRun, WorkerProcess } from '../support/worker-process.js';

const INDEX = 0x01500001;
const TRANSIENT = 0x80000000;
const LOADED_SESSIONS = 0x02000000;

for (const isKept of [false, true])
  describe(`worker: doors, ${isKept ? 'with' : 'without'} checkpoints`, () => {
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

    it('share one TPM', async () => {
      const raw = worker.connect('tpm');
      const tcti = worker.connect('tcti');
      assert.equal(responseCode(await raw.transmit(nvDefineCounter(INDEX))), 0);
      assert.equal(responseCode(await tcti.transmit(nvIncrement(INDEX))), 0);
      assert.equal(counterOf(await raw.transmit(nvReadCounter(INDEX))), 1n);
      raw.close();
      tcti.close();
    });

    it('put commands together from single bytes', async () => {
      const client = worker.connect('tpm');
      client.socket.setNoDelay?.(true);
      for (const byte of getRandom()) {
        await new Promise<void>((resolve) => client.socket.write(Buffer.of(byte), () => resolve()));
      }
      assert.equal((await client.response()).length, 28);
      client.close();
    });

    it('answer what was sent ahead, in order', async () => {
      const client = worker.connect('tpm');
      const sizes = Array.from({ length: 300 }, (_, index) => 1 + (index % 32));
      client.send(Buffer.concat(sizes.map((size) => getRandom(size))));
      for (const size of sizes) assert.equal((await client.response()).readUInt16BE(10), size);
      client.close();
    });

    it('wait for a client that does not take its answers', async () => {
      const client = worker.connect('tpm');
      client.socket.pause();
      const count = 60_000;
      // 720 KB of commands and 2.9 MB of answers: more than the sockets hold.
      client.send(Buffer.concat(Array.from({ length: count }, () => getRandom(32))));
      const other = worker.connect('tpm');
      // One that takes its answers gets through twice the load meanwhile.
      for (let round = 0; round < 2; round++) {
        other.send(Buffer.concat(Array.from({ length: count }, () => getRandom(1))));
        await other.bytes(count * 13);
      }
      assert.ok(client.socket.writableLength > 0, 'the worker took commands whose answers it had to keep');
      client.socket.resume();
      for (let answer = 0; answer < count; answer++) {
        assert.equal((await client.response()).readUInt16BE(10), 32);
      }
      other.close();
      client.close();
    });

    it('answer many clients at once, each its own', async () => {
      await Promise.all(
        Array.from({ length: 12 }, async (_, index) => {
          const client = worker.connect(index % 2 === 0 ? 'tpm' : 'tcti');
          for (let round = 0; round < 40; round++) {
            assert.equal((await client.transmit(getRandom(index + 1))).readUInt16BE(10), index + 1);
          }
          client.close();
        }),
      );
    });

    it('answer a client that has sent its last and half-closed', async () => {
      const client = worker.connect('tpm');
      client.socket.end(Buffer.concat([getRandom(5), getRandom(6)]));
      assert.equal((await client.response()).readUInt16BE(10), 5);
      assert.equal((await client.response()).readUInt16BE(10), 6);
      await client.ended;
    });

    it('say when a connection is closed', async () => {
      const closed = worker.next('connection-closed');
      const client = worker.connect('tpm');
      await client.transmit(getRandom());
      client.close();
      assert.equal(typeof (await closed).id, 'number');
    });

    it('I-10: answer a size that no command has with TPM_RC_COMMAND_SIZE, and close', async () => {
      for (const size of [0, 9, 4097, 0xffffffff]) {
        const client = worker.connect('tpm');
        const lying = getRandom();
        lying.writeUInt32BE(size, 2);
        client.send(Buffer.concat([getRandom(), lying, getRandom()]));
        assert.equal(responseCode(await client.response()), 0);
        assert.equal(responseCode(await client.response()), 0x142);
        await client.ended;
        assert.equal(client.received.length, 0);
      }
    });

    it('I-10: answer a bad tag and an unknown command, and go on', async () => {
      const client = worker.connect('tpm');
      const badTag = getRandom();
      badTag.writeUInt16BE(0x1234, 0);
      assert.equal(responseCode(await client.transmit(badTag)), 0x1e);
      assert.equal(responseCode(await client.transmit('80010000000a20001234')), 0x143);
      assert.equal(responseCode(await client.transmit(getRandom())), 0);
      client.close();
    });

    it('I-10: forget a command whose end never comes', async () => {
      const client = worker.connect('tpm');
      const closed = worker.next('connection-closed');
      client.send(getRandom().subarray(0, 11));
      client.close();
      await closed;
      const next = worker.connect('tpm');
      assert.equal(responseCode(await next.transmit(getRandom())), 0);
      next.close();
    });

    it('let the supervisor and other doors be heard while a key is made', async () => {
      const client = worker.connect('tpm');
      const control = worker.connect('tcti-ctrl');
      const waiting = worker.connect('tpm');
      // Some keys are there at once: then another one. Were nobody heard meanwhile, none would ever be late.
      for (let round = 0, wasHeard = false; !wasHeard; round++) {
        assert.ok(round < 20, 'nobody was ever heard while a key was made');
        let isMade = false;
        const made = client.transmit(createPrimaryRsa(3072, Buffer.alloc(32, round))).finally(() => {
          isMade = true;
        });
        const queued = waiting.transmit(getRandom());
        control.send('00000001');
        assert.equal((await control.bytes(8)).readUInt32BE(0), 0);
        const passing = worker.connect('tpm');
        passing.close();
        await worker.closed(passing);
        wasHeard = !isMade;
        const response = await made;
        assert.equal(responseCode(response), 0);
        assert.equal(responseCode(await queued), 0);
        await client.transmit(flushContext(response.readUInt32BE(10)));
      }
      for (const one of [client, control, waiting]) one.close();
    });

    it('cancel what nobody waits for any more', async () => {
      const other = worker.connect('tpm');
      const left = async (): Promise<number[]> => handlesOf(await other.transmit(getHandles(TRANSIENT)));
      for (let round = 0, wasCancelled = false; !wasCancelled; round++) {
        assert.ok(round < 20, 'every key was made');
        const client = worker.connect('tpm');
        client.send(createPrimaryRsa(3072, Buffer.alloc(32, 100 + round)));
        client.close();
        // Not before its command is done.
        await worker.closed(client);
        const handles = await left();
        // Of the door tpm a key stays where its client is gone, if it is made.
        wasCancelled = handles.length === 0;
        for (const handle of handles) await other.transmit(flushContext(handle));
      }
      const stays = await other.transmit(createPrimaryRsa(3072));
      assert.deepEqual(await left(), [stays.readUInt32BE(10)]);
      await other.transmit(flushContext(stays.readUInt32BE(10)));
      other.close();
    });

    describe('tcti', () => {
      const loaded = async (first: number): Promise<number[]> => {
        const raw = worker.connect('tpm');
        const handles = handlesOf(await raw.transmit(getHandles(first)));
        raw.close();
        return handles;
      };
      const gone = async (client: { close(): void }): Promise<void> => {
        const closed = worker.next('connection-closed');
        client.close();
        await closed;
      };

      it('flushes what a client left loaded when it disconnects', async () => {
        for (let round = 0; round < 5; round++) {
          const client = worker.connect('tcti');
          for (let slot = 0; slot < 3; slot++) {
            assert.equal(responseCode(await client.transmit(createPrimaryEcc())), 0);
            assert.equal(responseCode(await client.transmit(startAuthSession())), 0);
          }
          await gone(client);
        }
        assert.deepEqual(await loaded(TRANSIENT), []);
        assert.deepEqual(await loaded(LOADED_SESSIONS), []);
      });

      it('flushes what a command loads after its client is gone', async () => {
        const client = worker.connect('tcti');
        await client.transmit(getRandom());
        client.send(createPrimaryRsa());
        await gone(client);
        assert.deepEqual(await loaded(TRANSIENT), []);
      });

      it('leaves other clients their objects, and a session whose context was saved', async () => {
        const raw = worker.connect('tpm');
        const kept = (await raw.transmit(createPrimaryEcc())).readUInt32BE(10);
        const client = worker.connect('tcti');
        const session = (await client.transmit(startAuthSession())).readUInt32BE(10);
        const context = (await client.transmit(contextSave(session))).subarray(10);
        await gone(client);
        assert.deepEqual(await loaded(TRANSIENT), [kept]);

        const second = worker.connect('tcti');
        const again = await second.transmit(contextLoad(context));
        assert.equal(responseCode(again), 0);
        assert.equal(again.readUInt32BE(10), session);
        await second.transmit(getRandom());
        await gone(second);
        assert.deepEqual(await loaded(LOADED_SESSIONS), []);
        await raw.transmit(flushContext(kept));
        raw.close();
      });

      it('keeps a client over its connections until the supervisor says that it is gone', async () => {
        const one = async (command: Buffer): Promise<Buffer> => {
          const client = worker.connect('tcti', 4711);
          const response = await client.transmit(command);
          await gone(client);
          return response;
        };
        const handle = (await one(createPrimaryEcc())).readUInt32BE(10);
        await one(getRandom());
        assert.deepEqual(await loaded(TRANSIENT), [handle]);
        worker.send({ type: 'peer-gone', peer: 4711 });
        assert.deepEqual(await loaded(TRANSIENT), []);
      });

      it('I-10: takes no more control commands from a client that does not take its answers', async () => {
        const client = worker.connect('tcti-ctrl');
        const other = worker.connect('tcti-ctrl');
        client.socket.pause();
        let sent = 0;
        const ask = async (): Promise<void> => {
          client.send('00000004');
          sent += 1;
          other.send('00000001');
          await other.bytes(8);
        };
        // Each is a request of its own: the worker has served the other client since. The kernel and the
        // streams of Node 24 hold tens of thousands of answers between the two.
        while (client.socket.writableLength === 0 && sent < 100_000) await ask();
        assert.ok(client.socket.writableLength > 0, 'the worker keeps answers without bound');
        client.socket.resume();
        await client.bytes(8);
        client.close();
        other.close();
      });

      it('answers the control commands of a client, and no others', async () => {
        const control = worker.connect('tcti-ctrl');
        const ask = async (request: string, length: number): Promise<string> => {
          control.send(request);
          return (await control.bytes(length)).toString('hex');
        };
        assert.equal(await ask('00000001', 8), '000000000000002c');
        assert.equal(await ask('00000004', 8), '0000000000000000');
        assert.equal(await ask('0000000500', 4), '00000000');
        assert.equal(await ask('0000000500000000', 4), '00000000');
        for (const locality of ['01', '04', 'ff'])
          assert.equal(await ask(`00000005${locality}`, 4), '0000003d');
        assert.equal(await ask('00000009', 4), '00000000');
        // INIT, SHUTDOWN, STORE_VOLATILE, GET_STATEBLOB, SET_STATEBLOB, STOP, SET_DATAFD, SET_BUFFERSIZE, unknown.
        for (const request of [
          '0000000200000000',
          '00000003',
          '0000000a',
          '0000000c000000010000000100000000',
          '0000000d000000000000000100000010',
          '0000000e',
          '00000010',
          '0000001100000000',
          'ffffffff',
        ]) {
          assert.equal(await ask(request, 4), '0000000a');
        }
        assert.equal(await ask('0000', 4), '00000003');
        control.close();
      });
    });
  });
