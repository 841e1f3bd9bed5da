import assert from 'node:assert/strict';
import { flush, Ht, listHandles, type Tpm } from 'tpm2-ts-bindings';
import { createLogger } from 'vtpm-common';
import { openAuditLog } from 'vtpm-manager/audit/index';
import { type Enrolment, readEnrolment, readNext } from 'vtpm-manager/enrolment';
import { openRootTpm } from 'vtpm-manager/root-tpm/index';
import { indicesInRange } from 'vtpm-manager/root-tpm/nv-index';
import { auditKeys } from 'vtpm-manager/service';
import { ANCHOR_KEY, openAnchor } from 'vtpm-manager/store/anchor';
import { openLmdbStore } from 'vtpm-manager/store/index';
import { unlock } from 'vtpm-manager/unlock';
import { killAt } from './faulty-worker.js';
import { ManagerLedger } from './manager-ledger.js';
import { ManagerLoad } from './manager-load.js';
import { ManagerInstallation } from './manager-process.js';
import { type Swtpm, startSwtpm } from './swtpm.js';
import { assertNothingLeaked, connectTpm } from './tpm-fixture.js';
import { until } from './until.js';

/** Where the manager is ended: the `count`th time it comes to a barrier, or so many milliseconds after its start. */
export type CrashPoint = { readonly barrier: string; readonly count: number } | { readonly afterMs: number };

/** What one operation of the manager has loaded at most; the kernel's resource manager takes it out after a crash. */
const MOST_SESSIONS = 2;
const MOST_OBJECTS = 2;
/** What only a rotation comes to. */
const ROTATION = /^(rotation|index|file)\./;

/** Of one point; more is a point that the load does not come to. */
const MOST_LIVES = 5;

/**
 * A manager on a swtpm that lives on, killed again and again while everything is asked of it. Each start is held against
 * all that was answered in any life before.
 */
export class ManagerCrashRig {
  /** How often it was killed at each barrier. */
  readonly reached = new Map<string, number>();
  crashes = 0;

  private constructor(
    private readonly manager: ManagerInstallation,
    private readonly tpm: Swtpm,
    private readonly load: ManagerLoad,
  ) {}

  static async create(): Promise<ManagerCrashRig> {
    const tpm = await startSwtpm();
    const manager = new ManagerInstallation();
    const { managerId } = await manager.init(`unix:${tpm.socket}`);
    const load = new ManagerLoad(manager, String(managerId), new ManagerLedger());
    await manager.start();
    await load.allowWorkers();
    await manager.stop();
    return new ManagerCrashRig(manager, tpm, load);
  }

  async destroy(): Promise<void> {
    this.load.disconnect();
    await this.manager.remove();
    await this.tpm.stop();
  }

  /**
   * Lives of the manager until one ends at this point. One may not come there: whom it retires, for example, the life
   * before has made.
   */
  async crash(point: CrashPoint): Promise<void> {
    for (let life = 1; life <= MOST_LIVES; life++) {
      const before = this.#timesReached(point);
      await this.#live(point);
      if (!('barrier' in point) || this.#timesReached(point) > before) return;
    }
  }

  #timesReached(point: CrashPoint): number {
    return 'barrier' in point ? (this.reached.get(point.barrier) ?? 0) : 0;
  }

  /** From its start to its violent end. */
  async #live(point: CrashPoint): Promise<void> {
    const isAtBarrier = 'barrier' in point;
    const prelude = isAtBarrier ? killAt(point.barrier, point.count) : '';
    const started = this.manager.start({
      args: ['--anchor-window', '1'],
      nodeArgs: ['--import', `data:text/javascript,${encodeURIComponent(prelude)}`],
    });
    const { child } = this.manager;
    const timer = isAtBarrier ? undefined : setTimeout(() => child?.kill('SIGKILL'), point.afterMs);
    try {
      await started;
      await this.load.settle();
      await this.load.resume();
      // A random moment may be in any round.
      for (let round = 0; round === 0 || !isAtBarrier; round++) {
        const rotates = isAtBarrier ? ROTATION.test(point.barrier) : round % 2 === 1;
        await this.load.round({ saves: 9, rotates });
      }
    } catch (error) {
      // What a dying manager does not answer is no failure; what it answered wrongly is.
      if (error instanceof assert.AssertionError) throw error;
      const ended = () => child?.exitCode !== null || child?.signalCode !== null;
      await until('the manager has ended', ended, 5_000).catch(() => {
        throw error;
      });
      if (child?.signalCode !== 'SIGKILL') throw error;
      if (isAtBarrier) this.reached.set(point.barrier, this.#timesReached(point) + 1);
    } finally {
      clearTimeout(timer);
      await this.manager.stop('SIGKILL');
      this.load.disconnect();
    }
    this.crashes++;
    await this.#examineTpm();
  }

  /** A last start, an end in order, and a look at everything that only shows then. */
  async finish(): Promise<void> {
    await this.manager.start();
    await this.load.settle();
    await this.load.loadAll();
    this.load.disconnect();
    await until('no rotation is under way', () => readNext(this.manager.paths) === undefined);
    assert.equal(await this.manager.stop(), 0);
    const enrolment = await this.#verify();
    await this.#withTpm(async (tpm) => {
      await assertNothingLeaked(tpm);
      const { anchor, revocation, root } = enrolment.tpm;
      const enrolled = [anchor.handle, revocation.handle, root.nvHandle];
      assert.deepEqual(await indicesInRange(tpm), enrolled.sort(), 'no NV index is left over');
    });
  }

  /** After a stop in order: the anchor says what the chip shows, and the whole audit log is authentic. */
  async #verify(): Promise<Enrolment> {
    const { paths } = this.manager;
    const root = await openRootTpm({ kind: 'unix', path: this.tpm.socket });
    const { keys, enrolment } = await unlock(root, paths, readEnrolment(paths), []);
    const log = createLogger('test', { 'log-level': 'silent', 'log-format': 'json' });
    const store = await openLmdbStore({
      directory: paths.store,
      create: false,
      sandbox: false,
      log,
      onLost: (error) => assert.fail(error),
    });
    try {
      const anchor = openAnchor(keys, (await store.get(ANCHOR_KEY))?.value ?? Buffer.alloc(0));
      assert.equal(await root.anchorCounter(enrolment.tpm, keys.anchorAuth).read(), anchor.counter);
      const audit = await openAuditLog(paths.audit, auditKeys(keys), anchor.audit);
      assert.equal((await audit.log.verify()).flaw, undefined);
      await audit.log.close();
    } finally {
      await store.close();
      keys.wipe();
      await root.close();
    }
    return enrolment;
  }

  /** Nothing is in the TPM that no enrolment knows of, and what is loaded is of one operation. */
  async #examineTpm(): Promise<void> {
    const { paths } = this.manager;
    const enrolments = [readEnrolment(paths), readNext(paths)].flatMap((file) => file?.enrolment ?? []);
    const known = new Set(enrolments.flatMap(indicesOf));
    await this.#withTpm(async (tpm) => {
      const there = await indicesInRange(tpm);
      for (const handle of there) assert.ok(known.has(handle), `NV index ${handle.toString(16)} is leaked`);
      const needed = enrolments.flatMap(({ tpm: { anchor, revocation, root } }) => [
        anchor.handle,
        revocation.handle,
        root.nvHandle,
      ]);
      for (const handle of needed)
        assert.ok(there.includes(handle), `NV index ${handle.toString(16)} is gone`);
      const sessions = await listHandles(tpm, Ht.HMAC_SESSION);
      const objects = await listHandles(tpm, Ht.TRANSIENT);
      assert.ok(sessions.length <= MOST_SESSIONS, `${sessions.length} sessions were left`);
      assert.ok(objects.length <= MOST_OBJECTS, `${objects.length} objects were left`);
      for (const handle of [...sessions, ...objects]) await flush(tpm, handle);
    });
  }

  async #withTpm(body: (tpm: Tpm) => Promise<void>): Promise<void> {
    const tpm = await connectTpm(this.tpm.socket);
    try {
      await body(tpm);
    } finally {
      await tpm.close();
    }
  }
}

function indicesOf({ tpm: { anchor, revocation, root }, erase, planned }: Enrolment): number[] {
  const generations = [root, ...erase].map(({ nvHandle }) => nvHandle);
  return [anchor.handle, revocation.handle, ...generations, ...planned.map(({ handle }) => handle)];
}
