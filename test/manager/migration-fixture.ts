import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { ManagerError } from 'vtpm-manager';
import type { Expected } from 'vtpm-manager/ownership/arrival';
import { signDecision } from 'vtpm-manager/ownership/decisions';
import type { Destination } from 'vtpm-manager/ownership/departure';
import type { TravellingState } from 'vtpm-manager/records/index';
import { openAnchoredStore } from 'vtpm-manager/store/index';
import {
  decode,
  type LoadGrant,
  type MigrateMode,
  type MigrationDecision,
  type MigrationHello,
  openBox,
  type SignedDecision,
} from 'vtpm-proto';
import { isA } from '../support/is-a.js';
import { MemoryStore } from '../support/memory-store.js';
import { loadRequest, TestSession } from '../support/worker-client.js';
import { Worker, type World } from './ownership-fixture.js';

/** The reference that a VMM holds. */
export const REFERENCE = Buffer.alloc(32, 9);
/** Of the VM run that every ticket of a test names. */
export const RUN = Buffer.alloc(16, 1);

/** The host id. */
export const idOf = (world: World): Buffer => world.keys.hostKey.publicKey;
export const peerOf = (world: World) => ({ hostId: idOf(world) });

/** One vTPM on its way from one world to another, step by step, as the protocol takes them. */
export class Journey {
  readonly migrationId = randomBytes(16);
  expected: Expected | undefined;
  state: TravellingState | undefined;
  frozen: { readonly epoch: bigint; readonly generation: bigint } | undefined;

  constructor(
    readonly from: World,
    readonly to: World,
    readonly worker: Worker,
    readonly mode: MigrateMode,
  ) {}

  get id(): string {
    return this.worker.vtpm.id;
  }

  get destination(): Destination {
    const { migrationId, mode } = this;
    return { migrationId, destination: idOf(this.to), at: 1n, mode };
  }

  /** What the source would say of it now. */
  async hello(changes: Partial<MigrationHello> = {}): Promise<MigrationHello> {
    const { header } = await this.from.registry.view(this.id);
    return {
      leastVersion: 1,
      mostVersion: 1,
      migrationId: this.migrationId,
      nonce: randomBytes(32),
      sessionKey: randomBytes(32),
      source: idOf(this.from),
      destination: idOf(this.to),
      vtpmUuid: this.worker.vtpm.uuid,
      vmUuid: this.worker.vtpm.vmUuid,
      vmRunId: header.vmRunId,
      epoch: header.epoch,
      generation: header.generation,
      mode: this.mode,
      recordFormat: 2,
      libtpmsVersion: '0.9.2',
      stateBytes: 1000n,
      description: new Uint8Array(0),
      dryRun: false,
      ...changes,
    };
  }

  /** @param hello what it says, where that was asked before */
  async expect(changes: Partial<MigrationHello> = {}, hello?: MigrationHello): Promise<Expected> {
    const said = hello ?? (await this.hello(changes));
    this.expected = await this.to.registry.arrivals.expect(said, peerOf(this.from));
    return this.expected;
  }

  /** The worker saves all of its TPM and stops. */
  async suspend(volatile = 'V', digest = REFERENCE): Promise<void> {
    const { worker } = this;
    const frozen = this.from.registry.departures.suspend(this.id);
    frozen.catch(() => undefined);
    const freeze = worker.link.frames.at(-1)!;
    if (freeze.type !== 'FREEZE') await frozen;
    worker.session!.cipher.openManager(freeze);
    if (volatile) await suspendingSave(worker, volatile, digest);
    await worker.stream!.receive(
      worker.session!.cipher.sealWorker('FROZEN', freeze.sequence, new Uint8Array(0)),
    );
    assert.equal(await frozen, 'frozen');
  }

  async depart(): Promise<TravellingState> {
    if (this.mode === 'OFFLINE') this.worker.stream?.detach();
    this.state = await this.from.registry.departures.depart(this.id, this.destination);
    const { epoch, generation } = this.state.header;
    this.frozen = { epoch, generation };
    return this.state;
  }

  /** A worker at the destination, whose Load waits. */
  load(changes: Parameters<Worker['ticket']>[0] = {}, referenceDigest?: Buffer): Waiting {
    const expectedEpoch = this.worker.session!.grant.epoch;
    return this.loadOf(new Worker(this.to, this.worker.vtpm), { expectedEpoch, ...changes }, referenceDigest);
  }

  loadOf(worker: Worker, changes: Parameters<Worker['ticket']>[0], referenceDigest?: Buffer): Waiting {
    return new Waiting(worker, { verbs: ['RESUME'], ...changes }, referenceDigest);
  }

  commit(): Promise<SignedDecision> {
    return this.to.registry.arrivals.commit(this.expected!, this.state!);
  }

  inquiry() {
    return {
      migrationId: this.migrationId,
      source: idOf(this.from),
      vtpmUuid: this.worker.vtpm.uuid,
      ...this.frozen!,
    };
  }

  /** What the source asks in doubt. */
  ask(): Promise<SignedDecision> {
    return this.to.registry.arrivals.abort(this.inquiry());
  }

  /** A decision as the destination would sign it, or another one. */
  forged(
    verdict: 'COMMIT' | 'ABORT',
    changes: Partial<MigrationDecision> = {},
    by = this.to,
  ): SignedDecision {
    const facts = { ...this.inquiry(), destination: idOf(this.to), verdict, ...changes };
    return signDecision(by.keys.hostKey, facts);
  }
}

/** A Load that has no answer yet. */
export class Waiting {
  readonly gone = new AbortController();
  readonly grant: Promise<LoadGrant>;
  extended = 0;

  constructor(
    readonly worker: Worker,
    changes: Parameters<Worker['ticket']>[0],
    referenceDigest?: Buffer,
  ) {
    const { world, keys } = worker;
    const request = loadRequest(world.managerId, worker.ticket(changes), keys, referenceDigest);
    const call = {
      signal: this.gone.signal,
      extend: (milliseconds: number) => {
        this.extended += milliseconds;
      },
    };
    this.grant = world.registry
      .load(request, worker.connection, () => undefined, call)
      .then((answer) => {
        const grant = openBox('LoadGrant', answer, world.managerId, keys);
        worker.session = new TestSession(worker.vtpm, grant);
        return grant;
      });
    // Whoever is interested asks.
    this.grant.catch(() => undefined);
  }
}

export async function suspendingSave(worker: Worker, volatile: string, digest = REFERENCE): Promise<void> {
  await worker.saveBody({
    permanent: Buffer.from('P-suspended'),
    volatile: Buffer.from(volatile),
    use: { action: 'SUSPEND', digest },
  });
}

export function decisionIn(signed: SignedDecision): MigrationDecision {
  return decode('MigrationDecision', signed.decision);
}

/** What the disk of a world holds now; `isNewest` says whether a start would take it. */
export async function copyOfDisk(world: World): Promise<{ isNewest(): Promise<boolean> }> {
  const entries = await world.disk.list(undefined, Number.MAX_SAFE_INTEGER);
  return {
    isNewest: async () => {
      try {
        await openAnchoredStore(new MemoryStore(entries), world.anchor);
        return true;
      } catch (error) {
        assert.ok(isA(error, ManagerError) && error.code === 'rollback-detected', String(error));
        return false;
      }
    },
  };
}
