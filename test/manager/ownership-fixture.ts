import assert from 'node:assert/strict';
import { bootId, monotonicMs } from 'vtpm-common';
import { ManagerError, type ManagerErrorCode } from 'vtpm-manager';
import { type AuditEvent, EMPTY_HEAD } from 'vtpm-manager/audit/index';
import type { KeyHierarchy } from 'vtpm-manager/keys/index';
import { Census } from 'vtpm-manager/ownership/census';
import type { VtpmEvent } from 'vtpm-manager/ownership/events';
import {
  type AttachedStream,
  type SaveLink,
  VtpmRegistry,
  type WorkerConnection,
} from 'vtpm-manager/ownership/registry';
import {
  type AnchoredStore,
  type AnchorOptions,
  createAnchoredStore,
  openAnchoredStore,
} from 'vtpm-manager/store/index';
import { createTrustStore, openTrustStore, type TrustStore } from 'vtpm-manager/trust/trust-configuration';
import {
  type Ack,
  type BoxKeyPair,
  boxKeyPair,
  decode,
  type LoadGrant,
  type ManagerFrame,
  openBox,
  type SaveBody,
} from 'vtpm-proto';
import { isA } from '../support/is-a.js';
import { MemoryStore } from '../support/memory-store.js';
import { anchorOptions, testKeys, unwatched } from '../support/test-keys.js';
import {
  loadRequest,
  TestSession,
  TestToolstack,
  type TestVtpm,
  testVtpm,
} from '../support/worker-client.js';

export const refused =
  (code: ManagerErrorCode) =>
  (error: unknown): boolean => {
    assert.ok(isA(error, ManagerError), String(error));
    assert.equal(error.code, code, error.message);
    return true;
  };

/** A link that keeps what the manager sends. */
export class RecordedLink implements SaveLink {
  readonly frames: ManagerFrame[] = [];
  ended: ManagerError | undefined;

  async send(frame: ManagerFrame): Promise<void> {
    this.frames.push(frame);
  }

  end(error: ManagerError): void {
    this.ended ??= error;
  }
}

/** A worker that talks to the registry directly. */
export class Worker {
  readonly keys: BoxKeyPair = boxKeyPair();
  readonly connection: WorkerConnection = {};
  link = new RecordedLink();
  session: TestSession | undefined;
  stream: AttachedStream | undefined;

  constructor(
    readonly world: World,
    readonly vtpm: TestVtpm,
  ) {}

  ticket(changes: Parameters<TestToolstack['ticket']>[3] = {}) {
    return this.world.toolstack.ticket(this.world.managerId, this.vtpm, this.keys.publicKey, changes);
  }

  async load(changes: Parameters<TestToolstack['ticket']>[3] = {}): Promise<LoadGrant> {
    const request = loadRequest(this.world.managerId, this.ticket(changes), this.keys);
    const answer = await this.world.registry.load(request, this.connection);
    const grant = openBox('LoadGrant', answer, this.world.managerId, this.keys);
    this.session = new TestSession(this.vtpm, grant);
    return grant;
  }

  /** HELLO, or RESUME on a new connection and link. */
  async connect(connection: WorkerConnection = this.connection): Promise<Ack> {
    this.link = new RecordedLink();
    this.stream = await this.world.registry.attach(this.session!.firstFrame(), this.link, connection);
    return this.lastAck();
  }

  save(permanent: string, sequence?: bigint): Promise<Ack> {
    return this.saveBody({ permanent: Buffer.from(permanent) }, sequence);
  }

  async saveBody(body: Partial<SaveBody>, sequence = ++this.session!.sequence): Promise<Ack> {
    await this.stream!.receive(this.session!.saveFrame(sequence, body));
    return this.lastAck();
  }

  lastAck(): Ack {
    const frame = this.link.frames.at(-1)!;
    assert.equal(frame.type, 'ACK');
    return decode('Ack', this.session!.cipher.openManager(frame));
  }
}

export class World {
  readonly toolstack = new TestToolstack();
  readonly disk = new MemoryStore();
  readonly events: VtpmEvent[] = [];
  readonly audited: AuditEvent[] = [];
  /** May throw: the log does not take it. */
  beforeAudit: (event: AuditEvent) => void = () => undefined;
  now = monotonicMs();
  boot = bootId();
  census = new Census();

  private constructor(
    readonly keys: KeyHierarchy,
    public store: AnchoredStore,
    readonly anchor: AnchorOptions,
  ) {}

  trust!: TrustStore;
  registry!: VtpmRegistry;

  static async create(keys = testKeys()): Promise<World> {
    const disk = new MemoryStore();
    const anchor = anchorOptions(keys);
    const store = await createAnchoredStore(disk, anchor);
    const world = new World(keys, store, anchor);
    Object.assign(world, { disk });
    await createTrustStore(keys, store, world.toolstack.key.publicKey, 1n);
    await world.start();
    await world.trust.allowImage(world.toolstack.imageDigest, 'test', 1n);
    return world;
  }

  async start(): Promise<void> {
    this.trust = await openTrustStore(this.keys, this.store);
    this.registry = new VtpmRegistry({
      keys: this.keys,
      store: this.store,
      trust: this.trust,
      ...unwatched,
      audit: {
        append: async (event) => {
          this.beforeAudit(event);
          this.audited.push(event);
          return EMPTY_HEAD;
        },
      },
      census: this.census,
      clock: { bootId: () => this.boot, monotonicMs: () => this.now },
    });
    this.registry.events.subscribe((event) => this.events.push(event));
  }

  /** What a kill -9 and a start of the manager leave: the disk. */
  async restart(): Promise<void> {
    const census = new Census();
    this.census = census;
    this.store = await openAnchoredStore(this.disk, {
      ...this.anchor,
      onEntry: (entry) => census.take(entry),
    });
    await this.start();
  }

  get managerId(): Uint8Array {
    return this.keys.identity.publicKey;
  }

  worker(vtpm: TestVtpm = testVtpm()): Worker {
    return new Worker(this, vtpm);
  }

  /** A worker whose vTPM is manufactured, generation 1. */
  async manufactured(vtpm: TestVtpm = testVtpm()): Promise<Worker> {
    const worker = this.worker(vtpm);
    await worker.load();
    await worker.connect();
    await worker.save('P1');
    return worker;
  }
}
