import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import {
  closeSync,
  existsSync,
  openSync,
  readFileSync,
  readSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import { createLogger } from 'vtpm-common';
import { ACCEPTANCE_KEY } from 'vtpm-manager/ownership/acceptance';
import { withLmdbStore } from 'vtpm-manager/store/index';
import { ManagerInstallation, StandInTpm } from '../support/manager-process.js';
import { until } from '../support/until.js';
import { type TestVtpm, testVtpm } from '../support/worker-client.js';

const STEP = 2 ** 32;

/** The lower half of a generation. */
function savesOf(generation: unknown): number {
  return Number(generation) % STEP;
}

/** How many of the needles are in what the process can write to. */
function inMemory(pid: number, needles: readonly Buffer[]): number {
  const memory = openSync(`/proc/${pid}/mem`, 'r');
  const found = new Set<Buffer>();
  try {
    for (const line of readFileSync(`/proc/${pid}/maps`, 'utf8').split('\n')) {
      const [, first, last] = /^([0-9a-f]+)-([0-9a-f]+) rw/.exec(line) ?? [];
      if (first === undefined || last === undefined) continue;
      const bytes = Buffer.alloc(Number.parseInt(last, 16) - Number.parseInt(first, 16));
      const length = readSync(memory, bytes, 0, bytes.length, Number.parseInt(first, 16));
      for (const needle of needles) if (bytes.subarray(0, length).includes(needle)) found.add(needle);
    }
  } finally {
    closeSync(memory);
  }
  return found.size;
}

interface Restored {
  readonly isDone: boolean;
  readonly vtpms: {
    readonly id: string;
    readonly action: string;
    readonly from?: number | null;
    readonly to?: number;
    readonly next?: number | null;
    readonly reason?: { readonly code: string; readonly message: string };
  }[];
}

describe('backup and restore', function () {
  this.timeout(120_000);
  let tpm: StandInTpm;
  let manager: ManagerInstallation;
  let managerId: string;
  let secret: string;
  let publicKey: string;
  let files = 0;

  before(async () => {
    tpm = new StandInTpm();
    await tpm.start();
  });
  beforeEach(async () => {
    manager = new ManagerInstallation();
    managerId = String((await manager.init(`unix:${tpm.socket}`)).managerId);
    await startAndAllow();
    secret = join(manager.home, 'backup.key');
    publicKey = String((await json('backup-keygen', '--output', secret)).public);
  });
  afterEach(() => manager.remove());
  after(() => tpm.stop());

  async function startAndAllow(): Promise<void> {
    assert.equal((await manager.start()).status, 'ready');
    const image = { digest: manager.toolstack.imageDigest.toString('hex'), note: 'test' };
    assert.equal((await manager.admin('POST', '/images', image)).status, 201);
  }

  async function json(...args: string[]): Promise<Record<string, unknown>> {
    const { code, stdout, stderr } = await manager.run(...args);
    assert.equal(code, 0, stderr);
    return JSON.parse(stdout) as Record<string, unknown>;
  }

  async function refuses(args: readonly string[], pattern: RegExp): Promise<void> {
    const { code, stderr } = await manager.run(...args);
    assert.equal(code, 1);
    assert.match(stderr, pattern);
  }

  /** A worker with the vTPM; a new vTPM is manufactured. */
  async function load(vtpm: TestVtpm, epoch: bigint) {
    const worker = manager.worker(managerId);
    const grant = await worker.load(
      manager.toolstack.ticket(worker.managerId, vtpm, worker.keys.publicKey, {
        expectedEpoch: epoch,
        verbs: epoch === 0n ? ['MANUFACTURE'] : ['COLD'],
      }),
    );
    return { worker, grant, session: await worker.session(vtpm, grant) };
  }

  /** A vTPM that nobody runs, with these states saved one after the other. */
  async function saved(vtpm: TestVtpm, epoch: bigint, ...states: string[]): Promise<void> {
    const loaded = await load(vtpm, epoch);
    for (const state of states) await loaded.session.save({ permanent: Buffer.from(state) });
    await leave(vtpm, loaded);
  }

  async function view(vtpm: TestVtpm): Promise<Record<string, unknown>> {
    return (await manager.admin('GET', `/vtpms/${vtpm.id}`)).body;
  }

  async function gone(vtpm: TestVtpm): Promise<void> {
    await until('the worker is gone', async () => {
      const { session } = await view(vtpm);
      return !(session as { connected: boolean } | null)?.connected;
    });
  }

  async function leave(vtpm: TestVtpm, { worker, session }: Awaited<ReturnType<typeof load>>): Promise<void> {
    session.stream?.end();
    await gone(vtpm);
    worker.close();
  }

  async function stateOf(vtpm: TestVtpm, epoch: bigint): Promise<string> {
    const loaded = await load(vtpm, epoch);
    await leave(vtpm, loaded);
    return Buffer.from(loaded.grant.permanent).toString();
  }

  async function backup(...ids: string[]): Promise<string> {
    const file = join(manager.home, `${++files}.vtpm`);
    await json('backup', ...ids, '--to', publicKey, '--output', file);
    return file;
  }

  async function restore(file: string, ...args: string[]): Promise<Restored> {
    return (await json('restore', file, '--key-file', secret, ...args)) as unknown as Restored;
  }

  it('I-7 leaves nothing of a state in the memory of the manager that took it', async () => {
    const vtpm = testVtpm();
    const state = randomBytes(16 * 1024).toString('hex');
    await saved(vtpm, 0n, state);
    const file = await backup();
    await manager.stop();
    await manager.start();
    const note = randomBytes(16).toString('hex');
    const digest = randomBytes(32).toString('hex');
    assert.equal((await manager.admin('POST', '/images', { digest, note })).status, 201);
    await restore(file, '--accept-rollback');
    // Node's HTTP parser has one buffer of 64 KiB, which nobody can reach: what it read last is in it until the next.
    const filler = await manager.admin('POST', '/images', { note: 'x'.repeat(64 * 1024) });
    assert.equal(filler.status, 413);
    const pid = manager.child?.pid ?? -1;
    assert.ok(inMemory(pid, [Buffer.from(note)]) > 0, 'positive control');
    const pieces = [];
    for (let at = 0; at < state.length; at += 256) pieces.push(Buffer.from(state.slice(at, at + 64)));
    assert.equal(inMemory(pid, pieces), 0);
  });

  it('I-5 takes a vTPM back with consent, at a generation that was never used, marked for ever', async () => {
    const vtpm = testVtpm();
    await saved(vtpm, 0n, 'one', 'two');
    const file = await backup();
    await saved(vtpm, 1n, 'three', 'four', 'five');
    const plan = await restore(file);
    const [first] = plan.vtpms;
    assert.deepEqual([first?.action, first?.from, first?.to, first?.next], ['restore', 5, 2, null]);
    assert.equal(plan.isDone, false);
    assert.equal((await view(vtpm)).generation, 5, 'a plan changes nothing');
    const [done] = (await restore(file, '--accept-rollback')).vtpms;
    const next = done?.next ?? 0;
    assert.deepEqual([done?.from, done?.to, savesOf(next)], [5, 2, 2]);
    assert.ok(next > STEP);
    const after = await view(vtpm);
    assert.deepEqual(
      [after.generation, after.epoch, after.marks, after.session],
      [next, 3, ['restored'], null],
    );
    assert.equal(await stateOf(vtpm, 3n), 'two');
    // Again: no generation comes twice, and the mark stays over a restart.
    await restore(file, '--accept-rollback');
    const again = Number((await view(vtpm)).generation);
    assert.equal(savesOf(again), 2);
    assert.ok(again > next);
    await manager.stop();
    await manager.start();
    assert.deepEqual((await view(vtpm)).marks, ['restored']);
  });

  it('I-3 a worker that is connected keeps its vTPM, one that comes back after the restore is fenced', async () => {
    const vtpm = testVtpm();
    const { worker, session } = await load(vtpm, 0n);
    await session.save({ permanent: Buffer.from('one') });
    const file = await backup(vtpm.id);
    const [refusal] = (await restore(file, '--accept-rollback')).vtpms;
    assert.equal(refusal?.action, 'refused');
    assert.equal(refusal?.reason?.code, 'busy');
    await session.save({ permanent: Buffer.from('two') });
    session.stream?.end();
    await gone(vtpm);
    await restore(file, '--accept-rollback');
    await assert.rejects(session.connect(worker.openStream()), { reason: 'fenced' });
    worker.close();
    assert.equal(await stateOf(vtpm, 2n), 'one');
  });

  it('a retired vTPM stays dead, and a backup brings the death back and not the vTPM', async () => {
    const [early, late] = [testVtpm(), testVtpm()];
    await saved(early, 0n, 'one');
    await saved(late, 0n, 'one');
    const living = await backup();
    for (const { id } of [early, late]) await manager.admin('POST', `/vtpms/${id}/retire`);
    const dead = await backup();
    const refusals = (await restore(living, '--accept-rollback')).vtpms;
    assert.deepEqual(
      refusals.map(({ action, reason }) => [action, reason?.code]),
      [
        ['refused', 'retired'],
        ['refused', 'retired'],
      ],
    );
    assert.equal((await view(early)).kind, 'retired');
    assert.deepEqual(
      (await restore(dead, '--accept-rollback')).vtpms.map(({ action }) => action),
      ['nothing', 'nothing'],
    );
  });

  it('another installation refuses it by name, whatever its file says', async () => {
    const vtpm = testVtpm();
    await saved(vtpm, 0n, 'one');
    const file = readFileSync(await backup());
    const key = readFileSync(secret);
    await manager.remove();
    manager = new ManagerInstallation();
    managerId = String((await manager.init(`unix:${tpm.socket}`)).managerId);
    await startAndAllow();
    writeFileSync(join(manager.home, 'other.vtpm'), file, { mode: 0o600 });
    writeFileSync(join(manager.home, 'backup.key'), key, { mode: 0o600 });
    const args = [
      'restore',
      join(manager.home, 'other.vtpm'),
      '--key-file',
      join(manager.home, 'backup.key'),
    ];
    await refuses([...args, '--accept-rollback'], /backup is of manager .*\(wrong-manager\)/);
    assert.equal((await manager.admin('GET', '/vtpms')).body.next, undefined);
    assert.deepEqual((await manager.admin('GET', '/vtpms')).body.vtpms, []);
  });

  it('refuses what is not whole, another key, and vTPMs that are not there', async () => {
    const vtpm = testVtpm();
    await saved(vtpm, 0n, 'one');
    const file = await backup();
    const bytes = readFileSync(file);
    const cut = join(manager.home, 'cut.vtpm');
    writeFileSync(cut, bytes.subarray(0, bytes.length - 10));
    await refuses(['restore', cut, '--key-file', secret, '--accept-rollback'], /cut off.*\(bad-request\)/);
    const other = join(manager.home, 'other.key');
    await json('backup-keygen', '--output', other);
    await refuses(['restore', file, '--key-file', other, '--accept-rollback'], /encrypted to another key/);
    const unknown = testVtpm().id;
    await refuses(['restore', file, unknown, '--key-file', secret], /has no vTPM .*\(unknown-vtpm\)/);
    await refuses(
      ['backup', unknown, '--to', publicKey, '--output', join(manager.home, 'none.vtpm')],
      /\(unknown-vtpm\)/,
    );
    await refuses(['backup', '--to', publicKey, '--output', file], /no backup is written over another/);
    assert.equal(existsSync(join(manager.home, 'none.vtpm')), false);
    assert.equal((await view(vtpm)).generation, 1);
  });

  it('is in the audit log with who, which and to whom', async () => {
    const vtpm = testVtpm();
    await saved(vtpm, 0n, 'one');
    const file = await backup(vtpm.id);
    assert.equal(statSync(file).mode & 0o777, 0o600);
    await restore(file, '--accept-rollback');
    const { generation } = await view(vtpm);
    await manager.stop();
    const entries = readFileSync(manager.paths.audit, 'utf8')
      .trim()
      .split('\n')
      .map((line) => JSON.parse(line) as Record<string, unknown>)
      .filter(({ action }) => action === 'backup' || action === 'restore');
    assert.deepEqual(
      entries.map(({ action, verdict, vtpm: id }) => [action, verdict, id]),
      [
        ['backup', 'intended', undefined],
        ['backup', 'intended', vtpm.id],
        ['backup', 'done', undefined],
        ['restore', 'intended', vtpm.id],
        ['restore', 'done', vtpm.id],
      ],
    );
    assert.deepEqual(
      entries.slice(-2).map((entry) => entry.generation),
      [String(generation), String(generation)],
    );
    for (const { actor } of entries) assert.deepEqual(actor, { uid: process.getuid?.() });
    assert.deepEqual((entries.at(0)?.facts as { to?: string } | undefined)?.to, publicKey.slice(-64));
  });

  it('I-4 saves go on while a backup is made, and it holds each vTPM as it was after it began', async () => {
    const vtpms = Array.from({ length: 40 }, () => testVtpm());
    for (const vtpm of vtpms) await saved(vtpm, 0n, 'x'.repeat(20_000));
    const busy = testVtpm();
    const loaded = await load(busy, 0n);
    const { session } = loaded;
    await session.save({ permanent: Buffer.from('0') });
    let isMade = false;
    const made = backup().finally(() => {
      isMade = true;
    });
    let last = 0;
    while (!isMade) await session.save({ permanent: Buffer.from(String(++last)) });
    assert.ok(last > 3, `${last} saves while the backup was made`);
    const file = await made;
    await leave(busy, loaded);
    await restore(file, busy.id, '--accept-rollback');
    const state = Number(await stateOf(busy, 2n));
    assert.ok(state >= 0 && state <= last, `state ${state} of ${last}`);
    const { generation } = await view(busy);
    assert.equal(savesOf(generation), state + 1, 'the state is the one of its generation');
  });

  it('I-9 a rebuild takes the place of a lost disk, and nothing else', async () => {
    const [vtpm, dead] = [testVtpm(), testVtpm()];
    await saved(vtpm, 0n, 'one', 'two');
    await saved(dead, 0n, 'one');
    await manager.admin('POST', `/vtpms/${dead.id}/retire`);
    const file = await backup();
    const args = [
      'rebuild',
      file,
      '--key-file',
      secret,
      '--toolstack-key',
      manager.toolstack.key.publicKey.toString('hex'),
    ];
    await refuses(args, /another vtpm-managerd runs/);
    await manager.stop();
    await refuses(args, /a rebuild is for an installation whose disk is lost.*\(already-initialised\)/);
    rmSync(manager.paths.directory, { recursive: true });
    const result = await json(...args);
    assert.equal(result.managerId, managerId);
    // What was committed here after the backup is not in it: no ABORT of what came before is said.
    const { store: directory } = manager.paths;
    const silent = createLogger('test', { 'log-level': 'silent', 'log-format': 'json' });
    await withLmdbStore({ directory, create: false, sandbox: false, log: silent }, async (store) =>
      assert.ok(await store.get(ACCEPTANCE_KEY)),
    );
    await startAndAllow();
    assert.equal(await stateOf(vtpm, 2n), 'two');
    const { generation, marks } = await view(vtpm);
    assert.deepEqual([savesOf(generation), marks], [2, ['restored']]);
    assert.ok(Number(generation) > STEP);
    assert.equal((await view(dead)).kind, 'retired');
  });

  it('a rebuild with the recovery key, then recover, do without the TPM', async () => {
    const vtpm = testVtpm();
    await manager.remove();
    manager = new ManagerInstallation();
    const made = await manager.init(`unix:${tpm.socket}`);
    managerId = String(made.managerId);
    await startAndAllow();
    secret = join(manager.home, 'backup.key');
    publicKey = String((await json('backup-keygen', '--output', secret)).public);
    await saved(vtpm, 0n, 'one', 'two');
    const file = await backup();
    await manager.stop();
    rmSync(manager.paths.directory, { recursive: true });
    const recovery = join(manager.home, 'recovery.key');
    writeFileSync(recovery, String(made.recoveryKey), { mode: 0o600 });
    const other = new StandInTpm();
    await other.start();
    try {
      const toolstackKey = manager.toolstack.key.publicKey.toString('hex');
      const args = ['rebuild', file, '--key-file', secret, '--toolstack-key', toolstackKey];
      const result = await json(...args, '--recovery-key-file', recovery);
      assert.equal(result.needsRecover, true);
      await assert.rejects(manager.start(), /ended with 1/);
      const to = ['--tpm', `unix:${other.socket}`];
      await json('recover', '--recovery-key-file', recovery, ...to, '--accept-rollback', '--json');
      await startAndAllow();
      assert.equal((await manager.admin('GET', '/health')).body.managerId, managerId);
      assert.deepEqual((await view(vtpm)).marks, ['restored', 'recovered']);
      assert.equal(await stateOf(vtpm, 3n), 'two');
    } finally {
      await manager.stop();
      await other.stop();
    }
  });

  it('a backup from before a rotation restores, and rebuilds with the recovery key alone', async () => {
    const vtpm = testVtpm();
    await saved(vtpm, 0n, 'one');
    const file = await backup();
    const rotated = await manager.admin('POST', '/platform/rotations', {});
    assert.equal(rotated.status, 200, JSON.stringify(rotated.body));
    await restore(file, '--accept-rollback');
    assert.equal(await stateOf(vtpm, 2n), 'one');
    await manager.stop();
    rmSync(manager.paths.directory, { recursive: true });
    const toolstackKey = manager.toolstack.key.publicKey.toString('hex');
    await refuses(
      ['rebuild', file, '--key-file', secret, '--toolstack-key', toolstackKey],
      /use the recovery key: --recovery-key-file/,
    );
    await assert.rejects(manager.start(), /ended with 1/);
  });
});
