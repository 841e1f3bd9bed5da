import assert from 'node:assert/strict';
import { renameSync, symlinkSync } from 'node:fs';
import { createLogger } from 'vtpm-common';
import { readEnrolment } from 'vtpm-manager/enrolment';
import { ManagerError } from 'vtpm-manager/error';
import { openRootTpm } from 'vtpm-manager/root-tpm/index';
import { Rotation } from 'vtpm-manager/rotation';
import type { Service } from 'vtpm-manager/service';
import { unlock } from 'vtpm-manager/unlock';
import { aboutIndex, denied, startRecordingProxy } from '../support/recording-proxy.js';
import { until } from '../support/until.js';
import { crashingAt, type Guest, Host } from './platform-fixture.js';

/** A worker that saves without a pause, over as many links as it needs. */
class Saver {
  acknowledged = 0;
  attempted = 0;
  fences: string[] = [];
  #isOver = false;
  #done: Promise<void> | undefined;

  constructor(
    private readonly host: Host,
    readonly guest: Guest,
  ) {}

  begin(): void {
    this.#done = this.#save();
  }

  async end(): Promise<void> {
    this.#isOver = true;
    await this.#done;
  }

  async more(count: number): Promise<void> {
    const wanted = this.acknowledged + count;
    await until(`${count} more saves`, () => this.acknowledged >= wanted);
  }

  async #save(): Promise<void> {
    const { guest } = this;
    while (!this.#isOver) {
      try {
        const next = this.attempted + 1;
        this.attempted = next;
        await guest.session.save({ permanent: Buffer.from(`save ${next}`) });
        this.acknowledged = next;
      } catch (error) {
        const reason = String((error as { reason?: string }).reason);
        if (reason === 'fenced') this.fences.push(String(error));
        await this.#resume();
      }
    }
  }

  async #resume(): Promise<void> {
    const { guest, host } = this;
    await until('the link is back', async () => {
      if (this.#isOver) return true;
      try {
        guest.worker.close();
        guest.worker = host.manager.worker(host.managerId);
        const { session } = guest;
        session.stream = guest.worker.openStream();
        const lastAcknowledged = BigInt(this.acknowledged + 1);
        session.stream.send(session.firstFrame({ lastAcknowledged }));
        // A save whose acknowledgement was lost is in or not; the next one follows what is. The first came before.
        const { committed } = await session.ack();
        session.sequence = committed;
        this.attempted = Number(committed) - 1;
        this.acknowledged = this.attempted;
        return true;
      } catch (error) {
        if ((error as { reason?: string }).reason === 'fenced') this.fences.push(String(error));
        return false;
      }
    });
  }
}

describe('a rotation of the root key', () => {
  let host: Host;
  beforeEach(async () => {
    host = await Host.create();
  });
  afterEach(() => host.destroy());

  const generation = () => readEnrolment(host.manager.paths).enrolment.tpm.root.generation;
  const settled = () =>
    until('the rotation is done', async () => {
      const { enrolment } = readEnrolment(host.manager.paths);
      return !(await host.view()).isRotating && enrolment.erase.length + enrolment.planned.length === 0;
    });

  it('loses nothing of workers that save all the while, and fences none', async () => {
    await host.manager.start();
    await host.allowImage();
    const savers: Saver[] = [];
    for (let i = 0; i < 4; i++) savers.push(new Saver(host, await host.guest()));
    const idle = await host.guest('idle');
    idle.worker.close();
    for (const saver of savers) saver.begin();
    const from = savers.map(({ acknowledged }) => acknowledged);
    for (let i = 0; i < 3; i++) {
      assert.equal((await host.post('/platform/rotations')).status, 200);
      for (const saver of savers) await saver.more(3);
    }
    for (const saver of savers) await saver.end();
    assert.equal(generation(), 4);
    for (const [i, { guest, acknowledged, attempted, fences }] of savers.entries()) {
      assert.deepEqual(fences, []);
      assert.ok(acknowledged > (from[i] ?? 0) + 8);
      assert.equal(acknowledged, attempted);
      const { permanent, generation: at } = await host.loaded(guest.vtpm.id, 1n);
      assert.equal(permanent, `save ${acknowledged}`);
      assert.equal(at, BigInt(acknowledged + 1), 'a rekey is no save');
    }
    assert.equal((await host.loaded(idle.vtpm.id, 1n)).permanent, 'idle');
    await host.manager.stop();
    await host.assertNothingLeft();
  });

  it('does not pass over what is being made while it begins', async () => {
    await host.manager.start();
    await host.allowImage();
    // Loads in flight: their records are not in the store yet when the rotation lists it.
    let isOver = false;
    const guests: Guest[] = [];
    const makers = Array.from({ length: 6 }, async () => {
      while (!isOver) guests.push(await host.guest('made'));
    });
    for (let i = 0; i < 3; i++) assert.equal((await host.post('/platform/rotations')).status, 200);
    isOver = true;
    await Promise.all(makers);
    assert.ok(guests.length > 6);
    for (const { vtpm } of guests) {
      assert.equal((await host.loaded(vtpm.id, 1n)).permanent, 'made');
    }
  });

  it('that failed half-way is gone on with, never begun once more', async () => {
    const { paths } = host.manager;
    const file = readEnrolment(paths);
    const tpm = await openRootTpm(file.enrolment.tpm);
    const { keys, enrolment } = await unlock(tpm, paths, file, []);
    let failures = 1;
    const service = {
      audit: { append: async () => undefined },
      erasure: { pendingSince: () => undefined },
      rekey: async () => {
        if (failures-- > 0) throw new ManagerError('store-full', 'the disk is full');
      },
      count: async () => undefined,
    };
    const rotation = new Rotation({
      ...{ paths, tpm, keys, enrolment, isRotating: false, eraseAfter: 0 },
      log: createLogger('test', { 'log-level': 'silent', 'log-format': 'json' }),
      service: () => service as unknown as Service,
    });
    try {
      await assert.rejects(rotation.rotate({ actor: 'manager' }), /disk is full/);
      assert.equal(generation(), 1, 'the store is under both');
      assert.deepEqual(
        keys.generations.map(({ keyId }) => keyId),
        [2, 1],
      );
      assert.equal((await rotation.rotate({ actor: 'manager' })).tpm.root.generation, 2);
      assert.equal(generation(), 2);
      assert.equal(keys.generations.length, 1);
    } finally {
      await rotation.stop();
      await tpm.close();
    }
    await host.assertNothingLeft();
  });

  it('believes no erasure that the bus made up: it is repeated until the chip has proved it', async () => {
    const { nvHandle } = readEnrolment(host.manager.paths).enrolment.tpm.root;
    const { socket } = host.tpm;
    const chip = `${socket}.chip`;
    renameSync(socket, chip);
    let isErasing = false;
    const bus = await startRecordingProxy(
      chip,
      aboutIndex(nvHandle, (answer) => (isErasing ? denied() : answer)),
    );
    symlinkSync(bus.path, socket);
    try {
      await host.manager.start();
      isErasing = true;
      const { status, body } = await host.post('/platform/rotations');
      assert.notEqual(status, 200);
      assert.equal((body.error as { code: string }).code, 'tpm-fault', JSON.stringify(body));
      const { erase } = readEnrolment(host.manager.paths).enrolment;
      assert.deepEqual(
        erase.map((root) => root.nvHandle),
        [nvHandle],
      );
      isErasing = false;
      assert.equal((await host.post('/platform/rotations')).status, 200);
      await host.manager.stop();
    } finally {
      await bus.close();
      renameSync(chip, socket);
    }
    await host.assertNothingLeft();
  });

  it('refuses a second one, and a revocation, while it runs', async () => {
    await host.manager.start();
    await host.adopt();
    const survivors = [await host.signed('first', { next: true })];
    const [rotated, second] = await Promise.all([
      host.post('/platform/rotations'),
      host.post('/platform/revocations', { survivors }),
    ]);
    assert.equal(rotated.status, 200);
    // In turn, or refused: never in between.
    assert.ok([200, 409].includes(second.status), JSON.stringify(second.body));
    await host.manager.stop();
    assert.equal((await host.manager.start()).status, 'ready');
    await host.manager.stop();
    await host.assertNothingLeft();
  });

  /** Arguments for Node: `source` runs once, when the manager comes to the barrier. */
  const onceAt = (barrier: string, source: string) => [
    '--import',
    `data:text/javascript,${encodeURIComponent(`import { readFileSync } from 'node:fs';
      let isDone = false;
      globalThis[Symbol.for('vtpm.barrier')] = (name) => {
        if (name !== '${barrier}' || isDone) return;
        isDone = true;
        ${source}
      };`)}`,
  ];
  const KILL_STORE =
    "for (const pid of readFileSync('/proc/self/task/' + process.pid + '/children', 'utf8').trim().split(' ')) process.kill(Number(pid), 'SIGKILL');";

  for (const barrier of ['rotation.written', 'rotation.counted']) {
    it(`goes on by itself when the store is lost at ${barrier}, and open again`, async () => {
      await host.manager.start({ nodeArgs: onceAt(barrier, KILL_STORE) });
      await host.allowImage();
      const saver = new Saver(host, await host.guest());
      saver.begin();
      await host.post('/platform/rotations');
      await until('the store is open again', () => /is open again/.test(host.manager.stderr));
      await settled();
      await saver.more(3);
      await saver.end();
      assert.deepEqual(saver.fences, []);
      assert.equal(generation(), 2);
      assert.equal((await host.loaded(saver.guest.vtpm.id, 1n)).permanent, `save ${saver.acknowledged}`);
      assert.equal(await host.manager.stop(), 0);
      await host.assertNothingLeft();
      assert.equal((await host.manager.start()).status, 'ready');
    });
  }

  for (const barrier of ['rotation.made', 'rotation.rekeyed']) {
    it(`is stopped in order at ${barrier}, and goes on at the next start`, async () => {
      await host.manager.start({ nodeArgs: onceAt(barrier, "process.kill(process.pid, 'SIGTERM');") });
      await host.allowImage();
      const { vtpm, worker } = await host.guest('P1');
      worker.close();
      const { child } = host;
      const rotated = host.post('/platform/rotations').catch(() => undefined);
      await until('the manager has ended', () => child.exitCode !== null);
      assert.equal(child.exitCode, 0, host.manager.stderr);
      await rotated;
      assert.equal((await host.manager.start()).status, 'ready');
      await settled();
      assert.equal((await host.loaded(vtpm.id, 1n)).permanent, 'P1');
      await host.manager.stop();
      await host.assertNothingLeft();
      assert.equal(generation(), 2);
    });
  }

  it('is waited for, where the manager goes on with it by itself, by whoever asks for another one', async () => {
    await host.manager.start({ nodeArgs: crashingAt('rotation.counted', 1) });
    const { child } = host;
    await host.post('/platform/rotations').catch(() => undefined);
    await until('the manager is dead', () => child.signalCode === 'SIGKILL');
    // Held until the request is there.
    const hold = 'Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 500);';
    assert.equal((await host.manager.start({ nodeArgs: onceAt('rotation.counted', hold) })).status, 'ready');
    const { status, body } = await host.post('/platform/rotations');
    assert.equal(status, 200, JSON.stringify(body));
    assert.equal(generation(), 3);
    await host.manager.stop();
    await host.assertNothingLeft();
  });

  // Each barrier of a rotation is also in the sample of fault/manager-crash.
  for (const [barrier, count] of [
    ['rotation.made', 1],
    ['store.commit', 2],
    ['anchor.stated', 2],
    ['rotation.rekeyed', 1],
    ['rotation.adopted', 1],
  ] as const) {
    it(`I-4 killed at ${barrier} (${count}) goes on at the next start`, async () => {
      await host.manager.start();
      await host.allowImage();
      const saver = new Saver(host, await host.guest());
      const idle = await host.guest('idle');
      idle.worker.close();
      await host.manager.stop();
      await host.manager.start({ nodeArgs: crashingAt(barrier, count) });
      await host.resume(saver.guest);
      const child = host.child;
      saver.begin();
      await host.post('/platform/rotations').catch(() => undefined);
      await until('the manager is dead', () => child.signalCode === 'SIGKILL');
      assert.equal((await host.manager.start()).status, 'ready');
      await settled();
      await saver.more(3);
      await saver.end();
      assert.deepEqual(saver.fences, []);
      assert.equal((await host.loaded(saver.guest.vtpm.id, 1n)).permanent, `save ${saver.acknowledged}`);
      assert.equal((await host.loaded(idle.vtpm.id, 1n)).permanent, 'idle');
      // Where it died before the next generation was written, the rotation never was.
      const was = generation();
      assert.equal((await host.post('/platform/rotations')).status, 200);
      assert.equal(generation(), was + 1);
      assert.equal((await host.loaded(idle.vtpm.id, 2n)).permanent, 'idle');
      await host.manager.stop();
      await host.assertNothingLeft();
      assert.equal((await host.manager.start()).status, 'ready');
    });
  }
});
