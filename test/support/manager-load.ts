import assert from 'node:assert/strict';
import { randomBytes, randomInt } from 'node:crypto';
import type { LoadGrant, SaveBody } from 'vtpm-proto';
import {
  type ManagerLedger,
  readManager,
  type Shown,
  type ShownVtpm,
  type VtpmHistory,
} from './manager-ledger.js';
import type { ManagerInstallation } from './manager-process.js';
import {
  saveBytes,
  sha256,
  type TestSession,
  type TestVtpm,
  testVtpm,
  type WorkerClient,
} from './worker-client.js';

/** A vTPM with the session of its worker, which outlives the manager. */
interface Guest {
  readonly vtpm: TestVtpm;
  readonly history: VtpmHistory;
  session: TestSession | undefined;
  /** Sequence of the last save that was acknowledged. */
  acknowledged: bigint;
}

export interface Round {
  /** Saves of each steady vTPM, at least. */
  readonly saves: number;
  readonly rotates: boolean;
}

/**
 * Everything that clients do to a manager, at once: two steady vTPMs save without a pause, while another one is made, an
 * older one is retired, images come and go and the root key is rotated. What was asked and answered is in the ledger.
 */
export class ManagerLoad {
  readonly #steady: Guest[];
  /** Saved, and connected to nobody since the manager was last started. */
  #idle: Guest[] = [];
  #made: Guest[] = [];
  /** Or about to be. */
  readonly #retired = new Map<string, Guest>();
  #workers: WorkerClient[] = [];
  readonly #images: string[] = [];

  constructor(
    private readonly manager: ManagerInstallation,
    private readonly managerId: string,
    readonly ledger: ManagerLedger,
  ) {
    this.#steady = [0, 1].map(() => this.#guest());
  }

  /** Once, on a new installation. */
  async allowWorkers(): Promise<void> {
    await this.#changeImage(this.manager.toolstack.imageDigest.toString('hex'), true);
  }

  /** Holds what the manager says against the ledger, and goes on from there. */
  async settle(): Promise<Shown> {
    const shown = await readManager(this.manager);
    this.ledger.check(shown);
    this.ledger.settle(shown);
    this.#idle = [...this.#idle, ...this.#made].filter(
      ({ history }) => history.epoch > 0n && !history.retirement,
    );
    this.#made = [];
    return shown;
  }

  /** The steady vTPMs go on: with their sessions, as workers do that have lived on, or with new ones. */
  async resume(): Promise<void> {
    for (const guest of this.#steady) {
      const { history, session } = guest;
      // A new epoch has a new session.
      const isResumed = session !== undefined && session.grant.epoch === history.epoch && randomInt(4) > 0;
      await (isResumed ? this.#resumeSession(guest, session) : this.#load(guest));
    }
  }

  /** After `settle`: loads each vTPM that is there and compares what it holds with what was saved. */
  async loadAll(): Promise<void> {
    for (const guest of [...this.#steady, ...this.#idle]) await this.#load(guest);
  }

  /** Loads what a manager shows that was started from an image, which the ledger goes on without. */
  async examine(shown: readonly ShownVtpm[]): Promise<void> {
    const guests = [...this.#steady, ...this.#idle, ...this.#made];
    for (const { id, epoch, generation } of shown.filter(({ kind }) => kind === 'live')) {
      const guest = guests.find(({ history }) => history.id === id) ?? this.#retired.get(id);
      assert.ok(guest, id);
      const grant = await this.#ask(guest.vtpm, BigInt(epoch), this.#connect());
      assert.equal(grant.generation, BigInt(generation));
      this.#checkGrant(guest.history, grant);
    }
  }

  async round({ saves, rotates }: Round): Promise<void> {
    let isBusy = true;
    const operators = [this.#operate(), ...(rotates ? [this.#rotate()] : [])];
    void Promise.allSettled(operators).then(() => {
      isBusy = false;
    });
    const savers = this.#steady.map(async (guest) => {
      for (let done = 0; done < saves || isBusy; done += 3) await this.#save(guest, 3);
    });
    // None of them may go on into the manager's next life.
    const ends = await Promise.allSettled([...operators, ...savers]);
    for (const end of ends) if (end.status === 'rejected') throw end.reason;
  }

  /** The manager is gone, or is to see its workers go. */
  disconnect(): void {
    for (const worker of this.#workers.splice(0)) worker.close();
  }

  async #operate(): Promise<void> {
    const image = randomBytes(32).toString('hex');
    await this.#changeImage(image, true);
    const old = this.#idle.shift();
    if (old) {
      this.#retired.set(old.history.id, old);
      const claim = this.ledger.retire(old.history);
      await this.#admin('POST', `/vtpms/${old.history.id}/retire`, 200);
      claim.answered();
    }
    const made = this.#guest();
    this.#made.push(made);
    await this.#load(made);
    await this.#save(made, 1);
    await this.#save(made, 2);
    const unused = this.#images.shift();
    if (unused !== undefined) await this.#changeImage(unused, false);
    this.#images.push(image);
  }

  async #rotate(): Promise<void> {
    const claim = this.ledger.rotation();
    const { status, body } = await this.manager.admin('POST', '/platform/rotations', {});
    // One that a crash interrupted may be under way.
    if (status === 409) return;
    assert.equal(status, 200, JSON.stringify(body));
    this.ledger.rotated(claim, body.generation as number);
  }

  async #changeImage(digest: string, isAllowed: boolean): Promise<void> {
    const claim = this.ledger.image(digest, isAllowed);
    if (isAllowed) await this.#admin('POST', '/images', 201, { digest });
    else await this.#admin('DELETE', `/images/${digest}`, 200);
    claim.answered();
  }

  async #admin(method: string, path: string, expected: number, body?: object): Promise<void> {
    const answer = await this.manager.admin(method, path, body);
    assert.equal(answer.status, expected, `${method} ${path}: ${JSON.stringify(answer.body)}`);
  }

  #guest(): Guest {
    const vtpm = testVtpm();
    return { vtpm, history: this.ledger.history(vtpm.id), session: undefined, acknowledged: 0n };
  }

  async #load(guest: Guest): Promise<void> {
    const { vtpm, history } = guest;
    const worker = this.#connect();
    const expectedEpoch = history.epoch;
    const claim = this.ledger.load(history);
    const grant = await this.#ask(vtpm, expectedEpoch, worker);
    claim.answered();
    assert.equal(grant.epoch, expectedEpoch + 1n);
    this.ledger.granted(history, grant.epoch);
    this.#checkGrant(history, grant);
    guest.session = await worker.session(vtpm, grant);
    guest.acknowledged = 0n;
  }

  #ask(vtpm: TestVtpm, expectedEpoch: bigint, worker: WorkerClient): Promise<LoadGrant> {
    const ticket = this.manager.toolstack.ticket(worker.managerId, vtpm, worker.keys.publicKey, {
      expectedEpoch,
      verbs: ['MANUFACTURE', 'RESUME'],
    });
    return worker.load(ticket);
  }

  /** One save is one unit: all of its parts are there, and of the same save. */
  #checkGrant(history: VtpmHistory, { generation, permanent, suspended }: LoadGrant): void {
    if (generation === 0n) return;
    const content = sha256(permanent).toString('hex');
    assert.equal(
      content,
      this.ledger.saveOf(history, generation)?.content,
      `the content of ${history.id}, generation ${generation}`,
    );
    const { volatile } = suspendedBody(permanent);
    assert.deepEqual(suspended && Buffer.from(suspended.volatile), volatile);
  }

  async #resumeSession(guest: Guest, session: TestSession): Promise<void> {
    const { history } = guest;
    const stream = this.#connect().openStream();
    session.stream = stream;
    stream.send(session.firstFrame({ lastAcknowledged: guest.acknowledged }));
    const ack = await session.ack();
    session.sequence = ack.committed;
    guest.acknowledged = ack.committed;
    assert.equal(ack.generation, history.generation, `the generation of ${history.id}`);
    if (ack.committed > 0n) {
      const digest = Buffer.from(ack.digest).toString('hex');
      assert.equal(digest, this.ledger.saveOf(history, ack.generation)?.digest);
    }
  }

  /** `count` saves that are all on their way before the first is acknowledged. */
  async #save(guest: Guest, count: number): Promise<void> {
    const { history, session } = guest;
    assert.ok(session?.stream);
    const saves = [];
    for (let i = 0; i < count; i++) {
      const permanent = randomBytes(200 + randomInt(8000));
      const body = { permanent, ...suspendedBody(permanent) };
      session.sequence += 1n;
      const digest = sha256(saveBytes(body)).toString('hex');
      saves.push(this.ledger.save(history, digest, sha256(permanent).toString('hex')));
      session.stream.send(session.saveFrame(session.sequence, body));
    }
    for (const save of saves) {
      const ack = await session.ack();
      assert.equal(ack.generation, save.generation);
      this.ledger.saved(history, save);
      guest.acknowledged += 1n;
    }
  }

  #connect(): WorkerClient {
    const worker = this.manager.worker(this.managerId);
    this.#workers.push(worker);
    return worker;
  }
}

/** Some of the TPMs are suspended when they are saved: as many as the manager takes without a pause. */
function suspendedBody(permanent: Uint8Array): Pick<SaveBody, 'volatile' | 'use'> {
  if (permanent[0] !== 0) return {};
  const digest = sha256(permanent);
  const volatile = Buffer.concat([Buffer.from('volatile of '), digest]);
  return { volatile, use: { action: 'SUSPEND', digest } };
}
