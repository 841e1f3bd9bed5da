import assert from 'node:assert/strict';
import { type ChildProcess, execFile } from 'node:child_process';
import { generateKeyPairSync } from 'node:crypto';
import { cpSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import {
  Alg,
  type Approval,
  type ApprovalRequest,
  Ht,
  listHandles,
  PCR_Extend,
  permanent,
  signApproval,
  withPassword,
} from 'tpm2-ts-bindings';
import { readEnrolment } from 'vtpm-manager/enrolment';
import { killAt } from '../support/faulty-worker.js';
import { ManagerInstallation } from '../support/manager-process.js';
import { type Swtpm, startSwtpm } from '../support/swtpm.js';
import { connectTpm } from '../support/tpm-fixture.js';
import { type TestSession, type TestVtpm, testVtpm, type WorkerClient } from '../support/worker-client.js';

export interface Authority {
  readonly publicKey: string;
  readonly privateKey: string;
}

export function makeAuthority(): Authority {
  const { publicKey, privateKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' });
  return {
    publicKey: publicKey.export({ type: 'spki', format: 'pem' }) as string,
    privateKey: privateKey.export({ type: 'pkcs8', format: 'pem' }) as string,
  };
}

export interface Guest {
  readonly vtpm: TestVtpm;
  worker: WorkerClient;
  session: TestSession;
}

/** PCR 16 is reset by anyone, so that a test brings "firmware" back and forth. */
export const PCR = 16;
export const SELECTION = `sha256:${PCR}`;
export const NAME = `sha256:${PCR}`;

/** A manager on a chip of its own, outside its home: the real processes. */
export class Host {
  readonly manager = new ManagerInstallation();
  readonly authority = makeAuthority();
  readonly #directory = mkdtempSync(join(tmpdir(), 'vtpm-host-'));
  readonly #guests: Guest[] = [];
  managerId = '';
  recoveryKey = '';

  private constructor(public tpm: Swtpm) {}

  static async create(...initArgs: string[]): Promise<Host> {
    const host = new Host(await startSwtpm());
    const made = await host.manager.init(`unix:${host.tpm.socket}`, '--pcrs', SELECTION, ...initArgs);
    host.managerId = String(made.managerId);
    host.recoveryKey = String(made.recoveryKey);
    return host;
  }

  async destroy(): Promise<void> {
    for (const { worker } of this.#guests) worker.close();
    await this.manager.remove();
    await this.tpm.stop();
    rmSync(this.#directory, { recursive: true, force: true });
  }

  /** Starts a manager that kills itself at the `count`th `barrier`. Resolves when it is dead. */
  async diesAt(barrier: string, count: number, ...args: string[]): Promise<void> {
    const { signal } = await this.manager.runWith(crashingAt(barrier, count), ...args);
    assert.equal(signal, 'SIGKILL', `it came to ${barrier}`);
  }

  post(path: string, body: object = {}) {
    return this.manager.admin('POST', path, body);
  }

  async view(): Promise<Record<string, unknown>> {
    const { status, body } = await this.manager.admin('GET', '/platform');
    assert.equal(status, 200, JSON.stringify(body));
    return body;
  }

  async pcr(): Promise<string> {
    return ((await this.view()).pcrs as Record<string, string>)[NAME] ?? '';
  }

  /** What the authority signs, where its key is. */
  async signed(label: string, facts: object = {}, authority = this.authority): Promise<Approval> {
    const { status, body } = await this.post('/platform/requests', { label, ...facts });
    assert.equal(status, 200, JSON.stringify(body));
    return signApproval(body as unknown as ApprovalRequest, authority.privateKey);
  }

  async approve(label: string, facts: object = {}): Promise<Record<string, unknown>> {
    const approval = await this.signed(label, facts);
    const { status, body } = await this.post('/platform/approvals', { approval });
    assert.equal(status, 201, JSON.stringify(body));
    return body;
  }

  /** Under an authority, with the values of now approved. */
  async adopt(label = 'first', authority = this.authority): Promise<void> {
    const approval = await this.signed(label, {}, authority);
    const approved = await this.post('/platform/approvals', { approval, authority: authority.publicKey });
    assert.equal(approved.status, 201, JSON.stringify(approved.body));
    const { status, body } = await this.post('/platform/policy', { authority: authority.publicKey });
    assert.equal(status, 200, JSON.stringify(body));
  }

  /** Needs the chip, which serves one client: the manager must not run, or be between commands of its own. */
  async extend(text: string): Promise<void> {
    const tpm = await connectTpm(this.tpm.socket);
    try {
      const digest = Buffer.alloc(32, text);
      await tpm.run(
        PCR_Extend,
        { pcrHandle: withPassword(permanent(PCR)) },
        { digests: [{ hashAlg: Alg.SHA256, digest }] },
      );
    } finally {
      await tpm.close();
    }
  }

  /** The registers as after power-on. The manager must not run. */
  async reboot(): Promise<void> {
    await this.tools('tpm2_shutdown');
    await this.tpm.restart();
  }

  async tools(program: string, ...args: string[]): Promise<string> {
    const TPM2TOOLS_TCTI = `swtpm:path=${this.tpm.socket}`;
    const { stdout } = await promisify(execFile)(program, args, {
      env: { ...process.env, TPM2TOOLS_TCTI, TSS2_LOG: 'all+NONE' },
    });
    return stdout;
  }

  /** NV indices in the chip. The manager must not run. */
  async indices(): Promise<string[]> {
    const tpm = await connectTpm(this.tpm.socket);
    try {
      return (await listHandles(tpm, Ht.NV_INDEX)).map((handle) => `0x${handle.toString(16)}`).sort();
    } finally {
      await tpm.close();
    }
  }

  /** The three indices that the enrolment names, and no other, are in the chip. The manager must not run. */
  async assertNothingLeft(): Promise<void> {
    const { enrolment } = readEnrolment(this.manager.paths);
    const { root, anchor, revocation } = enrolment.tpm;
    const wanted = [root.nvHandle, anchor.handle, revocation.handle].map((h) => `0x${h.toString(16)}`).sort();
    assert.deepEqual(await this.indices(), wanted);
    assert.deepEqual(enrolment.erase, []);
    assert.deepEqual(enrolment.planned, []);
  }

  /** Everything of the installation's disk; the chip is not on it. */
  saveDisk(name = 'disk'): string {
    const copy = join(this.#directory, name);
    rmSync(copy, { recursive: true, force: true });
    cpSync(this.manager.paths.directory, copy, { recursive: true });
    return copy;
  }

  restoreDisk(copy: string): void {
    rmSync(this.manager.paths.directory, { recursive: true, force: true });
    cpSync(copy, this.manager.paths.directory, { recursive: true });
  }

  file(name: string, content: string): string {
    const path = join(this.#directory, name);
    writeFileSync(path, content);
    return path;
  }

  async allowImage(): Promise<void> {
    const digest = this.manager.toolstack.imageDigest.toString('hex');
    const { status } = await this.post('/images', { digest, note: 'test' });
    assert.equal(status, 201);
  }

  /** A worker with a manufactured vTPM, generation 1. */
  async guest(content = 'P1'): Promise<Guest> {
    const vtpm = testVtpm();
    const worker = this.manager.worker(this.managerId);
    const ticket = this.manager.toolstack.ticket(worker.managerId, vtpm, worker.keys.publicKey);
    const session = await worker.session(vtpm, await worker.load(ticket));
    await session.save({ permanent: Buffer.from(content) });
    const guest = { vtpm, worker, session };
    this.#guests.push(guest);
    return guest;
  }

  /** What a new worker gets. */
  async loaded(id: string, expectedEpoch: bigint): Promise<{ permanent: string; generation: bigint }> {
    const worker = this.manager.worker(this.managerId);
    const guest = this.#guests.find(({ vtpm }) => vtpm.id === id);
    assert.ok(guest);
    try {
      const changes = { expectedEpoch, verbs: ['COLD'] } as const;
      const { publicKey } = worker.keys;
      const ticket = this.manager.toolstack.ticket(worker.managerId, guest.vtpm, publicKey, {
        ...changes,
        verbs: [...changes.verbs],
      });
      const grant = await worker.load(ticket);
      return { permanent: Buffer.from(grant.permanent).toString(), generation: grant.generation };
    } finally {
      worker.close();
    }
  }

  /** The worker's link after the manager was away. */
  async resume(guest: Guest): Promise<void> {
    guest.worker.close();
    guest.worker = this.manager.worker(this.managerId);
    await guest.session.connect(guest.worker.openStream());
  }

  async vtpm(id: string): Promise<Record<string, unknown>> {
    const { status, body } = await this.manager.admin('GET', `/vtpms/${id}`);
    assert.equal(status, 200, JSON.stringify(body));
    return body;
  }

  get child(): ChildProcess {
    assert.ok(this.manager.child);
    return this.manager.child;
  }
}

/** Arguments for Node. */
export function crashingAt(barrier: string, count = 1): string[] {
  return ['--import', `data:text/javascript,${encodeURIComponent(killAt(barrier, count))}`];
}
