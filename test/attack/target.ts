import assert from 'node:assert/strict';
import { cpSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { decode } from 'vtpm-proto';
import { type Lmdb, openLmdb, tamperStore } from '../manager/store-fixture.js';
import { run } from '../support/installation.js';
import { isA } from '../support/is-a.js';
import { ManagerInstallation } from '../support/manager-process.js';
import { type Swtpm, startSwtpm } from '../support/swtpm.js';
import { RefusedError, type TestSession, type TestVtpm, testVtpm } from '../support/worker-client.js';

/** A worker that has its vTPM. */
export interface LoadedWorker {
  readonly vtpm: TestVtpm;
  readonly session: TestSession;
  /** What the vTPM had. */
  readonly permanent: string;
  /** Resolves when the manager has let it go. */
  close(): Promise<void>;
}

/** A record with its version, as it lies in the store. */
export interface RawRecord {
  readonly value: Buffer;
  readonly version: number;
}

/**
 * What an attacker has before him: a manager as real processes, with a TPM whose memory is in another directory than
 * anything that he puts back.
 */
export class Target {
  readonly #aside = mkdtempSync(join(tmpdir(), 'vtpm-aside-'));
  #copies = 0;

  private constructor(
    readonly manager: ManagerInstallation,
    readonly tpm: Swtpm | undefined,
    readonly managerId: string,
  ) {}

  /** Initialised, one worker image allowed, stopped. @param tpm shared with another target; undefined: one of its own */
  static async create(options: { tpm?: Swtpm | 'embedded'; anchorWindow?: number } = {}): Promise<Target> {
    const tpm = options.tpm ?? (await startSwtpm());
    const chip = tpm === 'embedded' ? undefined : tpm;
    const manager = new ManagerInstallation();
    const { managerId } = await manager.init(chip ? `unix:${chip.socket}` : 'embedded');
    const target = new Target(manager, chip, String(managerId));
    if (options.anchorWindow !== undefined) {
      const settings = { 'anchor-window': options.anchorWindow };
      writeFileSync(join(manager.home, 'config.json'), JSON.stringify(settings));
    }
    await manager.start();
    await target.allowImage(manager.toolstack.imageDigest);
    await manager.stop();
    return target;
  }

  async allowImage(digest: Buffer): Promise<void> {
    const { status } = await this.manager.admin('POST', '/images', { digest: digest.toString('hex') });
    assert.equal(status, 201);
  }

  /** A Load and a Save stream, with a new worker unless one is given. @throws RefusedError */
  async load(
    vtpm: TestVtpm = testVtpm(),
    epoch = 0n,
    worker = this.manager.worker(this.managerId),
  ): Promise<LoadedWorker> {
    const { manager } = this;
    try {
      const ticket = manager.toolstack.ticket(worker.managerId, vtpm, worker.keys.publicKey, {
        expectedEpoch: epoch,
        verbs: [epoch === 0n ? 'MANUFACTURE' : 'COLD'],
      });
      const grant = await worker.load(ticket);
      const session = await worker.session(vtpm, grant);
      return {
        vtpm,
        session,
        permanent: Buffer.from(grant.permanent).toString(),
        close: async () => {
          session.stream?.end();
          await session.stream?.ended;
          worker.close();
        },
      };
    } catch (error) {
      worker.close();
      throw error;
    }
  }

  /** A new vTPM with these saves; its worker is gone. */
  async vtpm(...saves: string[]): Promise<TestVtpm> {
    const worker = await this.load();
    for (const save of saves) await worker.session.save({ permanent: Buffer.from(save) });
    await worker.close();
    return worker.vtpm;
  }

  async retire(vtpm: TestVtpm): Promise<void> {
    const { status } = await this.manager.admin('POST', `/vtpms/${vtpm.id}/retire`);
    assert.equal(status, 200);
  }

  /** A backup of this one alone, to a new key. @returns what takes the vTPM back to it */
  async backup(vtpm: TestVtpm): Promise<{ restore(): Promise<void> }> {
    const [key, file] = [join(this.#aside, 'backup.key'), join(this.#aside, 'backup.vtpm')];
    const made = await this.#command('backup-keygen', '--output', key);
    await this.#command('backup', vtpm.id, '--to', String(made.public), '--output', file);
    return {
      restore: async () => {
        const { vtpms } = await this.#command('restore', file, '--key-file', key, '--accept-rollback');
        assert.equal((vtpms as { action: string }[])[0]?.action, 'restore');
      },
    };
  }

  async #command(...args: string[]): Promise<Record<string, unknown>> {
    const { code, stdout, stderr } = await this.manager.run(...args);
    assert.equal(code, 0, stderr);
    return JSON.parse(stdout) as Record<string, unknown>;
  }

  async view(vtpm: TestVtpm): Promise<Record<string, unknown>> {
    return (await this.manager.admin('GET', `/vtpms/${vtpm.id}`)).body;
  }

  /** All of the manager's disk: store, enrolment, audit log, approvals. @returns a copy, to be put back */
  keep(): string {
    const copy = join(this.#aside, String(++this.#copies));
    cpSync(this.manager.paths.directory, copy, { recursive: true });
    return copy;
  }

  /** @param what of the copy; all of it unless named */
  putBack(copy: string, what: 'all' | 'store' | 'audit' | 'enrolment' | 'approvals' = 'all'): void {
    const { paths } = this.manager;
    const target = what === 'all' ? paths.directory : paths[what];
    rmSync(target, { recursive: true });
    cpSync(join(copy, target.slice(paths.directory.length)), target, { recursive: true });
  }

  /** Changes the store on the disk, past the manager. */
  tamper(change: (db: Lmdb) => void): void {
    tamperStore(this.manager.paths.store, change);
  }

  /** @param copy of the disk; the disk as it is unless given */
  record(key: string, copy?: string): RawRecord {
    const db = openLmdb(copy === undefined ? this.manager.paths.store : join(copy, 'store'));
    try {
      const entry = db.getEntry(key);
      assert.ok(entry, `${key} is in the store`);
      return { value: Buffer.from(entry.value), version: entry.version };
    } finally {
      db.close();
    }
  }

  /** What the anchor on the disk says of the TPM's counter. @param copy as `record` */
  stated(copy?: string): bigint {
    const { statement } = decode('AnchorRecord', this.record('anchor', copy).value);
    return decode('AnchorStatement', statement).counter;
  }

  /** A start is refused for this reason, which is named and said. */
  async refuses(code: string, message: RegExp): Promise<void> {
    await assert.rejects(this.manager.start(), (error: Error) => {
      assert.match(error.message, new RegExp(`ended with 1: .*\\(${code}\\)\\s*$`, 's'));
      assert.match(error.message, message);
      return true;
    });
  }

  /** The positive control of what `refuses` shows. */
  async starts(): Promise<Record<string, unknown>> {
    const health = await this.manager.start();
    assert.equal(health.status, 'ready', JSON.stringify(health));
    return health;
  }

  /** What an operator does with the platform policy, over the admin plane. @returns the answer's body */
  async platform(call: string, body: object): Promise<Record<string, unknown>> {
    const answer = await this.manager.admin('POST', `/platform/${call}`, body);
    assert.ok(answer.status < 300, JSON.stringify(answer));
    return answer.body;
  }

  /** Runs one of tpm2-tools on the TPM; the manager must be stopped, as the TPM takes one client. */
  async tool(program: string, ...args: string[]): Promise<string> {
    const TPM2TOOLS_TCTI = `swtpm:path=${this.tpm?.socket}`;
    const { code, stdout, stderr } = await run(program, args, { TPM2TOOLS_TCTI });
    if (code !== 0) throw new Error(`${program} ended with ${code}: ${stderr}`);
    return stdout;
  }

  async destroy(): Promise<void> {
    await this.manager.remove();
    rmSync(this.#aside, { recursive: true });
  }
}

/** For assert.rejects: a call that the manager refused for this reason. */
export function refusedBecause(reason: string, message = /./): (error: unknown) => boolean {
  return (error) => {
    assert.ok(isA(error, RefusedError), String(error));
    assert.equal(error.reason, reason, error.message);
    assert.match(error.message, message);
    return true;
  };
}

/** The key of a vTPM's record in the store. */
export function keyOf(vtpm: TestVtpm): string {
  return `vtpm/${vtpm.id}`;
}
