import { bytesEqual, type LoadResponse, type MigrateMode, type MigrationHello, uuidToText } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import type { LoadCall, WorkerConnection } from './registry.js';
import type { CheckedLoad, LoadableHeader } from './ticket-check.js';

/** Milliseconds for which a place is held at most: beyond what a migration may take, a day where QEMU's RAM comes first. */
const HOLD_MS: Readonly<Record<MigrateMode, number>> = {
  OFFLINE: 10 * 60_000,
  LIVE: 10 * 60_000,
  VMM: 24 * 3_600_000,
};

/** A Load that waits for the vTPM to come. */
export interface WaitingLoad {
  readonly checked: CheckedLoad;
  readonly connection: WorkerConnection;
  readonly call: LoadCall;
}

/** One that waits, with its answer to come. */
interface Queued extends WaitingLoad {
  resolve(response: LoadResponse): void;
  reject(error: ManagerError): void;
}

/** Where the wait for a Load ends. */
interface Chooser {
  /** @returns why this one cannot be the one; undefined where it can */
  refusal(load: WaitingLoad): ManagerError | undefined;
  resolve(load: Queued): void;
  reject(error: ManagerError): void;
}

/**
 * The place of a vTPM that is expected here. What may load it is held against what its source said of it, and waits. Nothing
 * of it is durable: after a restart nobody expects it any more.
 */
export class Place {
  readonly vtpmUuid: string;
  readonly migrationId: Buffer;
  readonly source: Buffer;
  readonly mode: MigrateMode;
  /** As a record would say it. */
  readonly header: LoadableHeader;
  /** That it is to be committed is in the log. */
  isAnnounced = false;
  /** Resolves when a worker waits. */
  readonly loadWaiting: Promise<{ readonly libtpmsVersion: string }>;
  #tellWaiting!: (fact: { readonly libtpmsVersion: string }) => void;
  #tellReleased!: (error: ManagerError) => void;
  #load: Queued | undefined;
  /** The one that it is being given to. */
  #chosen: Queued | undefined;
  #chooser: Chooser | undefined;
  #released: ManagerError | undefined;
  readonly #timer: NodeJS.Timeout;
  readonly #until: number;

  /** @param onReleased called once, when nobody expects it here any more */
  constructor(
    readonly hello: MigrationHello,
    source: Uint8Array,
    private readonly onReleased: () => void,
  ) {
    this.vtpmUuid = uuidToText(hello.vtpmUuid);
    this.migrationId = Buffer.from(hello.migrationId);
    this.source = Buffer.from(source);
    this.mode = hello.mode;
    const { vmUuid, epoch, generation } = hello;
    this.header = { kind: 'LIVE', vmUuid: Buffer.from(vmUuid), epoch, generation };
    this.loadWaiting = new Promise((resolve, reject) => {
      this.#tellWaiting = resolve;
      this.#tellReleased = reject;
    });
    // Nobody need ask.
    this.loadWaiting.catch(() => undefined);
    const holdMs = HOLD_MS[this.mode];
    this.#until = performance.now() + holdMs;
    const late = new ManagerError(
      'peer-late',
      `vTPM ${this.vtpmUuid} did not come within ${holdMs / 1000} s`,
    );
    this.#timer = setTimeout(() => this.release(late), holdMs);
    this.#timer.unref();
  }

  /** Why it is not expected any more. */
  get released(): ManagerError | undefined {
    return this.#released;
  }

  /** @throws ManagerError `migration-aborted` where it is not expected any more */
  checkHeld(): void {
    if (this.#released) throw this.#gone();
  }

  /** Loads that wait get the error. */
  release(error: ManagerError): void {
    if (this.#released) return;
    this.#released = error;
    clearTimeout(this.#timer);
    this.onReleased();
    this.#tellReleased(error);
    this.#load?.reject(error);
    this.#load = undefined;
    this.#chosen?.reject(error);
    this.#chooser?.reject(this.#gone());
    this.#chooser = undefined;
  }

  /**
   * A Load whose ticket is in order. A newer one takes the place of the one before: that worker has ended, or its ticket
   * would not be. Not that of the chosen one, whose session is being written: it hears what came of that.
   * @throws ManagerError `migrating` where none is expected, `verb-missing`, `wrong-vm`, or why the vTPM did not come
   */
  wait(load: WaitingLoad): Promise<LoadResponse> {
    const { checked, call } = load;
    if (this.#released) throw this.#released;
    if (this.mode === 'OFFLINE') {
      throw new ManagerError(
        'migrating',
        `vTPM ${this.vtpmUuid} is on its way here and was stopped; load it when it has come`,
      );
    }
    if (!checked.ticket.verbs.includes('RESUME')) {
      throw new ManagerError(
        'verb-missing',
        `vTPM ${this.vtpmUuid} comes as it runs: the ticket needs the verb resume`,
      );
    }
    if (!bytesEqual(checked.ticket.vmRunId, this.hello.vmRunId)) {
      throw new ManagerError('wrong-vm', `vTPM ${this.vtpmUuid} comes as it runs, in another run of its VM`);
    }
    call.extend(this.#until - performance.now());
    return new Promise((resolve, reject) => {
      const queued: Queued = { ...load, resolve, reject };
      const gone = (): void => {
        if (this.#load === queued) this.#load = undefined;
        reject(new ManagerError('migration-aborted', 'the worker went before its vTPM had come'));
      };
      if (call.signal.aborted) return gone();
      call.signal.addEventListener('abort', gone, { once: true });
      this.#load?.reject(
        new ManagerError('fenced', `another worker waits for vTPM ${this.vtpmUuid} with a newer ticket`),
      );
      this.#load = queued;
      this.#tellWaiting({ libtpmsVersion: checked.claim.libtpmsVersion });
      this.#choose();
    });
  }

  /**
   * The Load that the vTPM is for.
   * @param refusal why one that waits cannot be it, which is its answer then: another one may come
   * @param isPatient waits for it where there is none; otherwise it is refused
   */
  chosen(refusal: Chooser['refusal'], isPatient: boolean): Promise<Queued> {
    return new Promise((resolve, reject) => {
      if (this.#released) return reject(this.#gone());
      this.#chooser?.reject(this.#gone());
      this.#chooser = { refusal, resolve, reject };
      this.#choose();
      if (this.#chooser && !isPatient) {
        this.#chooser = undefined;
        reject(new ManagerError('migration-aborted', `no worker waits for vTPM ${this.vtpmUuid} any more`));
      }
    });
  }

  #choose(): void {
    const chooser = this.#chooser;
    const load = this.#load;
    if (!chooser || !load) return;
    const refused = chooser.refusal(load);
    if (refused) {
      this.#load = undefined;
      load.reject(refused);
      return;
    }
    this.#chooser = undefined;
    this.#load = undefined;
    this.#chosen = load;
    chooser.resolve(load);
  }

  #gone(): ManagerError {
    return new ManagerError(
      'migration-aborted',
      `vTPM ${this.vtpmUuid} is not expected here any more: ${this.#released?.message ?? 'it is asked for twice'}`,
    );
  }

  isOf(migrationId: Uint8Array): boolean {
    return bytesEqual(this.migrationId, migrationId);
  }
}
