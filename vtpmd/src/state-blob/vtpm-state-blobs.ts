import { createHash, randomBytes } from 'node:crypto';
import { barrier } from 'vtpm-common/barrier';
import type { LoadGrant, StateUse } from 'vtpm-proto';
import type { HandleOwners } from '../channels/handle-owners.js';
import type { CheckpointKeeper } from '../checkpoint/keeper.js';
import { discard, type Snapshot, type TpmEngine } from '../engine/engine.js';
import { VtpmdError } from '../error.js';
import type { SaveSession } from '../manager-link/save-session.js';
import type { CommandQueue } from '../worker/command-queue.js';
import type { CommandSource } from '../worker/command-source.js';
import { expectStirred, freshStir } from '../worker/trial.js';
import { BroughtIn, type BroughtInNote } from './brought-in.js';
import { encodeReference, type ReferenceNames } from './reference.js';
import type { StartState, StateBlobs, StateBlobType } from './state-blobs.js';
import { encodeSuspended, readSuspended, type Suspended, useOf } from './suspended.js';
import { encodeBlob } from './swtpm-format.js';

export interface StateBlobParts {
  readonly engine: Pick<TpmEngine, 'snapshot' | 'process'>;
  readonly queue: Pick<CommandQueue, 'hold' | 'release' | 'whenIdle' | 'hasWaiting'>;
  readonly session: Pick<SaveSession, 'save' | 'generation'>;
  readonly keeper: Pick<CheckpointKeeper, 'keepSave'> | undefined;
  readonly owners: Pick<HandleOwners, 'serialised'>;
  readonly names: ReferenceNames;
  readonly grant: Pick<LoadGrant, 'suspended' | 'referenceKey'>;
  /** By its ticket the state goes out, and comes in, in the clear. */
  readonly mayExport: boolean;
  readonly mayImport: boolean;
  readonly note: BroughtInNote;
  /** References that are given out outlive this worker there. */
  readonly kept: KeptReferences;
  /** Waits for a manager that is away, as long as a VM can stand still. @throws VtpmdError `manager-away` */
  whenLinked(): Promise<void>;
  /** As PowerSwitch.settled. */
  stepDone(): Promise<void>;
  /** What nobody waits for went wrong: the TPM must not go on. */
  failed(error: unknown): void;
}

/** Where the two halves of a reference are: 0 is that to the permanent state, 1 that to the volatile one. */
export interface KeptReferences {
  keepReference(half: 0 | 1, blob: Buffer): void;
  dropReferences(): void;
}

/** Under which the queue is held while the TPM is frozen. */
const FROZEN = 'state-blob';
const EXPORT = 'export';
/** Who goes on with the VM where it sends a command. */
const VMM: CommandSource['kind'] = 'vmm-data';
const REFERENCE_BYTES = 32;

/** Permanent and volatile state of one moment, of which a VMM takes one after the other. */
type Pair = { permanent?: Buffer; volatile?: Buffer };

export class VtpmStateBlobs implements StateBlobs {
  readonly #parts: StateBlobParts;
  readonly #referenceKey: Buffer | undefined;
  readonly #broughtIn: BroughtIn;
  #suspended: Suspended | undefined;
  #isFrozen = false;
  /** When it is taken back. */
  #mustStir = false;
  /** What is left of the last export. */
  #pair: Pair = {};
  /** What the power-on that is under way is, for the Save that makes it durable. */
  #use: StateUse | undefined;
  #isRestored = false;
  #tail: Promise<unknown> = Promise.resolve();

  constructor(parts: StateBlobParts) {
    this.#parts = parts;
    const { referenceKey, suspended } = parts.grant;
    // The grant is wiped.
    this.#referenceKey = referenceKey && Buffer.from(referenceKey);
    this.#suspended = suspended && readSuspended(suspended);
    const { names, mayImport, note } = parts;
    this.#broughtIn = new BroughtIn(
      { names, mayImport, note, referenceKey: this.#referenceKey },
      this.#suspended !== undefined,
    );
  }

  get isFrozen(): boolean {
    return this.#isFrozen;
  }

  /**
   * The TPM of a worker before this one goes on. Where a reference to it is out, it stays frozen.
   * @param mustStir its generator, before a command runs @returns whether that is done here: it was frozen
   */
  async goOn(mustStir: boolean): Promise<boolean> {
    this.#broughtIn.clear();
    if (!this.#suspended) return false;
    this.#freeze();
    this.#mustStir = mustStir;
    await this.stay();
    return true;
  }

  async leave(): Promise<void> {
    await this.#inOrder(async () => {
      if (!this.#isFrozen) await this.#suspend(true);
    });
  }

  async stay(): Promise<void> {
    if (this.#suspended?.isMoving) await this.takeBack();
  }

  /** The engine runs from the suspended state, to which no reference is out. When this resolves that is durable. */
  async arrived(beforeSave: (permanent: Buffer) => void): Promise<void> {
    if (!this.#suspended) throw new VtpmdError('internal', 'the TPM is not suspended');
    await this.#saveStart(useOf('RESTORE', this.#suspended), true, beforeSave);
    this.#forget();
  }

  takeOut(type: StateBlobType): Promise<Buffer | undefined> {
    if (type === 'savestate') return Promise.resolve(undefined);
    return this.#inOrder(async () => {
      await this.#parts.whenLinked();
      return await (this.#parts.mayExport ? this.#export(type) : this.#refer(type));
    });
  }

  takeBack(): Promise<void> {
    return this.#inOrder(async () => {
      if (!this.#isFrozen || !this.#suspended) return;
      if (this.#mustStir) expectStirred(this.#parts.engine.process(freshStir()).response);
      await this.#save(useOf('TAKE_BACK', this.#suspended));
      barrier('after-take-back');
      this.#forget();
      this.#thaw();
    });
  }

  /** A command waits for the TPM. Where the VMM sent it, the VM goes on here. */
  commandWaits({ kind }: Pick<CommandSource, 'kind'>): void {
    if (kind === VMM && this.#isFrozen) this.#goOnHere();
  }

  bringIn(type: StateBlobType, blob: Uint8Array): void {
    this.#broughtIn.add(type, Buffer.from(blob.buffer, blob.byteOffset, blob.length), this.#suspended);
  }

  begin(): StartState {
    const brought = this.#broughtIn.get();
    const suspended = this.#suspended;
    this.#use = suspended && useOf('DROP', suspended);
    this.#isRestored = false;
    if (brought.kind === 'nothing') return { permanent: undefined, volatile: undefined };
    if (brought.kind === 'reference') {
      if (!suspended) throw new VtpmdError('reference-used', 'the TPM is not suspended any more');
      this.#use = useOf('RESTORE', suspended);
      this.#isRestored = true;
      return { permanent: undefined, volatile: Buffer.from(suspended.volatile) };
    }
    const { permanent, volatile } = brought;
    this.#use = { action: 'IMPORT', digest: digestOf(permanent, volatile) };
    this.#isRestored = volatile !== undefined;
    return { permanent: Buffer.from(permanent), volatile: volatile && Buffer.from(volatile) };
  }

  async started(beforeSave: (permanent: Buffer) => void): Promise<void> {
    const use = this.#use;
    this.#use = undefined;
    if (use) await this.#saveStart(use, this.#isRestored, beforeSave);
    this.#forget();
    this.#broughtIn.clear();
    this.#thaw();
  }

  stopped(): void {
    this.#broughtIn.clear();
    this.#wipePair();
    // What is off answers by itself; a reference that is out waits for the next power-on.
    this.#thaw();
  }

  async settled(): Promise<void> {
    await this.#tail;
  }

  async #saveStart(
    use: StateUse,
    isRestored: boolean,
    beforeSave: (permanent: Buffer) => void,
  ): Promise<void> {
    // The generator stands where it stood when the state was taken out: no random number may come twice.
    if (isRestored) expectStirred(this.#parts.engine.process(freshStir()).response);
    barrier('before-start-save');
    await this.#save(use, beforeSave);
    barrier('after-start-save');
  }

  async #refer(type: StateBlobType): Promise<Buffer> {
    const { kept, names } = this.#parts;
    const key = this.#referenceKey;
    if (!key) throw new VtpmdError('blob-refused', 'this manager knows no references; upgrade it');
    const suspended = this.#isFrozen && this.#suspended ? this.#suspended : await this.#suspend(false);
    // Whoever answers the VMM when this worker has ended, because the TPM goes to another host, has them from there.
    kept.keepReference(0, encodeReference(key, names, 'permanent', suspended));
    kept.keepReference(1, encodeReference(key, names, 'volatile', suspended));
    return encodeReference(key, names, type, suspended);
  }

  /** No command runs from here on. Permanent state, volatile state and reference become durable as one. */
  async #suspend(isMoving: boolean): Promise<Suspended> {
    const { queue, session, owners, stepDone } = this.#parts;
    this.#freeze();
    await queue.whenIdle();
    const snapshot = this.#parts.engine.snapshot();
    const reference = randomBytes(REFERENCE_BYTES);
    const suspension = {
      ...{ reference, isMoving },
      volatile: snapshot.volatile,
      owners: owners.serialised(),
    };
    const state = encodeSuspended(suspension);
    this.#parts.keeper?.keepSave(snapshot.permanent);
    barrier('before-suspend');
    const use = useOf('SUSPEND', suspension);
    await session.save(snapshot.permanent, { volatile: state, use });
    barrier('after-suspend');
    state.fill(0);
    snapshot.permanent.fill(0);
    const suspended = { ...suspension, generation: session.generation };
    this.#suspended = suspended;
    // What came while it was being frozen. The step that this is a part of leaves its checkpoint before that one's.
    if (queue.hasWaiting((source) => source.kind === VMM)) void stepDone().then(() => this.#goOnHere());
    return suspended;
  }

  /** Both halves are always of one moment, whatever runs between the two requests. */
  async #export(type: 'permanent' | 'volatile'): Promise<Buffer> {
    const state = this.#pair[type] ?? (await this.#takePair())[type];
    if (!state) throw new VtpmdError('internal', 'an export holds no state');
    const blob = encodeBlob(state);
    state.fill(0);
    delete this.#pair[type];
    return blob;
  }

  async #takePair(): Promise<Snapshot> {
    const { queue, engine, session, keeper } = this.#parts;
    this.#wipePair();
    queue.hold(EXPORT);
    try {
      await queue.whenIdle();
      const snapshot = engine.snapshot();
      const use: StateUse = { action: 'EXPORT', digest: digestOf(snapshot.permanent, snapshot.volatile) };
      keeper?.keepSave(snapshot.permanent);
      barrier('before-export');
      await session.save(snapshot.permanent, { use });
      barrier('after-export');
      this.#pair = { ...snapshot };
      return snapshot;
    } finally {
      queue.release(EXPORT);
    }
  }

  /** What is saved is the permanent state as it is. */
  async #save(
    use: StateUse,
    before = (permanent: Buffer) => this.#parts.keeper?.keepSave(permanent),
  ): Promise<void> {
    const snapshot = this.#parts.engine.snapshot();
    before(snapshot.permanent);
    await this.#parts.session.save(snapshot.permanent, { use });
    discard(snapshot);
  }

  #goOnHere(): void {
    this.takeBack().catch((error: unknown) => this.#parts.failed(error));
  }

  #freeze(): void {
    this.#isFrozen = true;
    this.#parts.queue.hold(FROZEN);
  }

  #thaw(): void {
    this.#isFrozen = false;
    this.#mustStir = false;
    this.#parts.queue.release(FROZEN);
  }

  #forget(): void {
    this.#parts.kept.dropReferences();
    this.#suspended?.volatile.fill(0);
    this.#suspended = undefined;
  }

  #wipePair(): void {
    this.#pair.permanent?.fill(0);
    this.#pair.volatile?.fill(0);
    this.#pair = {};
  }

  #inOrder<T>(operation: () => Promise<T>): Promise<T> {
    const run = this.#tail.then(operation);
    this.#tail = run.catch(() => undefined);
    return run;
  }
}

function digestOf(permanent: Uint8Array, volatile: Uint8Array | undefined): Buffer {
  const digest = createHash('sha256').update(permanent);
  if (volatile) digest.update(volatile);
  return digest.digest();
}
