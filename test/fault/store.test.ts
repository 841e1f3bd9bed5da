import assert from 'node:assert/strict';
import {
  closeSync,
  copyFileSync,
  cpSync,
  openSync,
  readFileSync,
  readSync,
  rmSync,
  statSync,
  truncateSync,
  writeSync,
} from 'node:fs';
import { join } from 'node:path';
import { connectGuest } from 'vtpm-quickstart/guest';
import { Installation } from '../support/installation.js';
import { GuestLoad, type Tally } from '../support/load.js';
import { ManagerInstallation } from '../support/manager-process.js';
import { storeProcesses } from '../support/store-processes.js';
import { until } from '../support/until.js';
import { type TestSession, type TestVtpm, testVtpm, type WorkerClient } from '../support/worker-client.js';

function killStore(directory: string): void {
  const pids = storeProcesses(directory);
  assert.ok(pids.length > 0, 'there is a store process');
  for (const pid of pids) {
    try {
      process.kill(pid, 'SIGKILL');
    } catch {
      // The first one took it along.
    }
  }
}

describe('I-10 a store process that is killed while guests save', function () {
  this.timeout(120_000);
  let installation: Installation;
  before(async () => {
    installation = await Installation.create({ tpm: 'embedded' });
    await installation.start();
  });
  after(() => installation?.destroy());

  it('I-4 I-8 I-10 again and again: every guest goes on by itself, and nothing acknowledged is lost', async () => {
    const names = ['web1', 'web2', 'web3'];
    const tallies = new Map<string, Tally>();
    const pids = new Map<string, number>();
    for (const name of names) {
      const guest = await connectGuest(await installation.vtpm(name));
      await guest.defineCounter();
      const start = await guest.counter();
      tallies.set(name, { attempted: start, acknowledged: start, seen: start });
      pids.set(name, await installation.workerPid(name));
      await guest.close();
    }
    const loads = await Promise.all(
      names.map((name) => GuestLoad.begin(installation.door(name), tallies.get(name)!)),
    );
    const progress = async (steps: bigint): Promise<void> => {
      const wanted = names.map((name) => tallies.get(name)!.acknowledged + steps);
      await until(
        'every guest goes on',
        () => names.every((name, at) => tallies.get(name)!.acknowledged >= wanted[at]!),
        20_000,
      );
    };
    for (let round = 1; round <= 5; round++) {
      await progress(5n);
      killStore(installation.paths.manager.store);
      const opened = () => installation.logs().split('is open again').length - 1;
      await until('the store is open again', () => opened() >= round);
    }
    await progress(5n);
    for (const load of loads) await load.stop();
    for (const name of names) {
      const guest = await connectGuest(installation.door(name));
      const { acknowledged, attempted, seen } = tallies.get(name)!;
      const counter = await guest.counter();
      assert.ok(acknowledged <= counter && seen <= counter && counter <= attempted, `${name}: ${counter}`);
      assert.equal(await installation.workerPid(name), pids.get(name), `the worker of ${name} has lived on`);
      await guest.close();
    }
  });
});

/** What a store's damage may be answered with; never with `ready` and other content, never with an empty store. */
const NAMED = /\((store-corrupt|store-missing|rollback-detected|newer-format)\)/;
const VTPMS = 6;

describe('I-10 a store file that was damaged under the whole manager', function () {
  this.timeout(240_000);
  let manager: ManagerInstallation;
  let managerId: string;
  let file: string;
  let good: string;
  const vtpms: TestVtpm[] = [];
  const states = new Map<string, Buffer>();
  /** The newest epoch of each, as far as the good copy knows. */
  const epochs = new Map<string, bigint>();

  before(async () => {
    manager = new ManagerInstallation();
    managerId = String((await manager.init('embedded')).managerId);
    file = join(manager.paths.store, 'data.mdb');
    good = join(manager.home, 'good.mdb');
    await manager.start();
    await allowImage();
    for (let at = 0; at < VTPMS; at++) {
      const vtpm = testVtpm();
      const state = Buffer.alloc(6000, at + 1);
      const { session, worker } = await loaded(vtpm, 0n);
      // Several times, so that the file has pages in use and pages that are free.
      for (let save = 0; save < 3; save++) await session.save({ permanent: state });
      vtpms.push(vtpm);
      states.set(vtpm.id, state);
      epochs.set(vtpm.id, 1n);
      worker.close();
    }
    await manager.stop();
    copyFileSync(file, good);
    cpSync(manager.paths.softtpm, `${good}.tpm`, { recursive: true });
  });
  afterEach(async () => {
    await manager.stop();
    putBack();
  });
  after(() => manager?.remove());

  /** With the memory of the embedded TPM, which is on the same disk: otherwise the good file would be an old one. */
  function putBack(): void {
    copyFileSync(good, file);
    rmSync(manager.paths.softtpm, { recursive: true });
    cpSync(`${good}.tpm`, manager.paths.softtpm, { recursive: true });
  }

  async function allowImage(): Promise<void> {
    const image = { digest: manager.toolstack.imageDigest.toString('hex'), note: 'test' };
    assert.equal((await manager.admin('POST', '/images', image)).status, 201);
  }

  async function loaded(
    vtpm: TestVtpm,
    epoch: bigint,
  ): Promise<{ session: TestSession; worker: WorkerClient }> {
    const worker = manager.worker(managerId);
    const ticket = manager.toolstack.ticket(worker.managerId, vtpm, worker.keys.publicKey, {
      expectedEpoch: epoch,
      verbs: epoch === 0n ? ['MANUFACTURE'] : ['COLD', 'MANUFACTURE'],
    });
    const grant = await worker.load(ticket);
    const expected = states.get(vtpm.id);
    if (expected) {
      assert.equal(grant.manufacture, false, 'never made anew');
      assert.ok(Buffer.from(grant.permanent).equals(expected), 'the state is what was saved');
    }
    return { worker, session: await worker.session(vtpm, grant) };
  }

  /** Ready with every vTPM whole, or refused by name. */
  async function startsWholeOrRefuses(what: string): Promise<'whole' | 'refused'> {
    try {
      const health = await manager.start();
      assert.equal(health.status, 'ready', what);
      assert.equal(health.vtpms, VTPMS, `${what}: a vTPM is missing and nobody says so`);
    } catch (error) {
      const { message } = error as Error;
      assert.match(message, NAMED, `${what}: ${message}`);
      return 'refused';
    }
    for (const vtpm of vtpms) {
      try {
        (await loaded(vtpm, epochs.get(vtpm.id)!)).worker.close();
      } catch (error) {
        // What verifying does not read, LMDB's list of free pages, shows with the first write.
        assert.match(
          String((error as { reason?: string }).reason),
          /^(store-corrupt|locked)$/,
          `${what}: ${error}`,
        );
        return 'refused';
      }
    }
    return 'whole';
  }

  function flip(offset: number, mask: number): void {
    const fd = openSync(file, 'r+');
    const byte = Buffer.alloc(1);
    readSync(fd, byte, 0, 1, offset);
    byte.writeUInt8(byte.readUInt8(0) ^ mask, 0);
    writeSync(fd, byte, 0, 1, offset);
    closeSync(fd);
  }

  it('I-10 without damage it starts whole (positive control)', async () => {
    assert.equal(await startsWholeOrRefuses('untouched'), 'whole');
  });

  it('I-9 I-10 truncated anywhere: refused by name, never begun anew', async () => {
    const { size } = statSync(good);
    for (const length of [0, 1, 4096, 8192, 3 * 4096, Math.floor(size / 2), size - 4096]) {
      truncateSync(file, length);
      assert.equal(await startsWholeOrRefuses(`truncated to ${length}`), 'refused', `truncated to ${length}`);
      assert.ok(statSync(file).size <= Math.max(length, 8192), 'no new store was made in its place');
      putBack();
    }
  });

  it('I-9 I-10 flipped bits in page headers and records: whole or refused, all neighbours alike', async () => {
    const pages = Math.floor(statSync(good).size / 4096);
    const outcomes = { whole: 0, refused: 0 };
    // The header of every third page (mdb.c, struct MDB_page: number, pad, flags, bounds), and places inside of pages.
    const places: [number, number][] = [];
    for (let page = 0; page < pages; page += 3) {
      places.push([page * 4096 + [0, 8, 10, 12, 14][page % 5]!, 1 << (page % 8)]);
      places.push([page * 4096 + 16 + ((page * 1237) % 4080), 0x10]);
    }
    for (const [offset, mask] of places.slice(0, 12)) {
      flip(offset, mask);
      outcomes[await startsWholeOrRefuses(`bit ${mask} at ${offset}`)] += 1;
      await manager.stop();
      putBack();
    }
    assert.ok(outcomes.refused > 0, 'positive control: some of the flips were in what is used');
  });

  it('I-10 damaged while it runs: what is read is refused, the manager is locked by name, and the good file starts whole', async () => {
    await manager.start();
    const [first, second] = vtpms as [TestVtpm, TestVtpm];
    const neighbour = await loaded(second, epochs.get(second.id)!);
    // Every page but the meta pages: wherever the record lies, it is hit.
    const before = readFileSync(file);
    for (let offset = 2 * 4096 + 100; offset < before.length; offset += 512) flip(offset, 0x55);
    await assert.rejects(loaded(first, epochs.get(first.id)!), (error: { reason?: string }) => {
      assert.match(String(error.reason), /store-corrupt|rollback-detected|locked/);
      return true;
    });
    const health = await until('the manager is locked', async () => {
      const { body } = await manager.admin('GET', '/health');
      return body.status === 'locked' ? body : undefined;
    });
    assert.match(String(health.reason), /store-corrupt|rollback-detected|internal/);
    assert.equal((await manager.admin('GET', '/vtpms')).status, 503);
    neighbour.session.stream!.send(neighbour.session.saveFrame(1n, { permanent: Buffer.from('later') }));
    const refusal = await neighbour.session.stream!.ended;
    assert.match(
      String(refusal?.reason),
      /locked|store-corrupt|shutting-down/,
      'the neighbour is told, by name',
    );
    neighbour.worker.close();
    await manager.stop();
    putBack();
    assert.equal(await startsWholeOrRefuses('the good file'), 'whole');
  });
});
