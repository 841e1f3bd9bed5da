import { randomBytes } from 'node:crypto';
import { existsSync } from 'node:fs';
import { setTimeout as delay } from 'node:timers/promises';
import { type Finding, type Logger, type Paths, privateDirectory, VERSION } from 'vtpm-common';
import { type AdminPlane, serveAdmin } from './admin/server.js';
import { readApprovals } from './approvals-file.js';
import type { AuditEvent } from './audit/index.js';
import { expectationOf, judge } from './doctor/index.js';
import { type Enrolment, nextPath, readEnrolment, type UnverifiedEnrolment } from './enrolment.js';
import { ManagerError } from './error.js';
import { type GrpcListener, serveToolstack, serveWorkers } from './grpc/server.js';
import { acquireLock } from './lock.js';
import { describeHealth, describeMetrics, type ManagerState, vtpmsOf } from './manager-state.js';
import type { PeerAddress } from './peer/address.js';
import { openPlatform, type Platform } from './platform.js';
import { PlatformControl } from './platform-control.js';
import { Rotation } from './rotation.js';
import { openService, type Service } from './service.js';
import { type Unlocked, unlock } from './unlock.js';

export interface DaemonOptions {
  readonly paths: Paths;
  readonly log: Logger;
  readonly storeSandbox: boolean;
  /** MiB of the store's file system below which no new vTPM is made. */
  readonly storeReserve: number;
  readonly tpmDeadlineMs: number;
  /** Seconds until the TPM counts saves. */
  readonly anchorWindow: number;
  /** Milliseconds that a start waits for what peers say; 0 does not ask. */
  readonly askPeersMs: number;
  /** Hours from a retirement to the rotation that erases; 0 never. */
  readonly eraseAfter: number;
  /** Where other hosts are listened for; none by default. */
  readonly peerAddresses: readonly PeerAddress[];
}

export interface Daemon {
  readonly status: ManagerState['status'];
  /** Ends streams, store, TPM and sockets, in this order. */
  stop(): Promise<void>;
}

/**
 * Starts the manager. Resolves when it is ready, or locked because the platform policy refuses the root key.
 * @throws ManagerError for everything else that is not as init left it
 */
export async function startDaemon(options: DaemonOptions): Promise<Daemon> {
  const paths = options.paths.manager;
  if (!existsSync(paths.directory)) readEnrolment(paths);
  const release = acquireLock(paths);
  const manager = new Manager(options, release);
  try {
    await manager.start();
    return manager;
  } catch (error) {
    await manager.stop();
    throw error;
  }
}

/** Milliseconds before each attempt to open a store again whose process ended. */
const REOPEN_AFTER_MS = [0, 500, 2_000, 10_000];
/** Reasons that pass by themselves: for these the last pause comes again and again. */
const PASSING = new Set(['tpm-unreachable', 'tpm-busy', 'tpm-lockout', 'store-full', 'in-use']);

/** Changes while locked that are kept for the audit log. */
const MAX_OWED = 64;

/** The store is open, and verified. */
interface Opened {
  readonly service: Service;
  /** Aborted with the reason when the store is lost. */
  readonly lost: AbortSignal;
}

class Manager implements Daemon {
  readonly #instance = randomBytes(16).toString('hex');
  readonly #log: Logger;
  readonly #paths: Paths['manager'];
  #state: ManagerState = { status: 'starting' };
  #file: UnverifiedEnrolment | undefined;
  #unlocked: Unlocked | undefined;
  #rotation: Rotation | undefined;
  #platform: Platform | undefined;
  #admin: AdminPlane | undefined;
  #listeners: GrpcListener[] = [];
  #stopping: Promise<void> | undefined;
  readonly #platformControl: PlatformControl;
  /** Attempts to unlock, one after the other. Never rejects. */
  #unlocking: Promise<void> = Promise.resolve();
  /** Open, whether or not it is served yet. */
  #open: Service | undefined;
  /** The store being opened again, once for each loss. Never rejects. */
  #reopening: Promise<void> = Promise.resolve();
  /** What other hosts rescued while this one was away is in effect, as far as they said so in time. */
  #hasAskedPeers = false;
  readonly #ended = new AbortController();
  /** What was done while the log could not be opened. */
  #owedToAudit: AuditEvent[] = [];

  constructor(
    private readonly options: DaemonOptions,
    private readonly releaseLock: () => void,
  ) {
    this.#log = options.log;
    this.#paths = options.paths.manager;
    this.#platformControl = new PlatformControl({
      paths: this.#paths,
      tpm: () => this.#tpm(),
      enrolment: () => this.#enrolment(),
      isReady: () => this.#state.status === 'ready',
      lockedBecause: () => (this.#state.status === 'locked' ? this.#state.reason : undefined),
      isRotating: () => this.#rotation?.isUnfinished ?? existsSync(nextPath(this.#paths)),
      rotation: () => this.#currentRotation(),
      unlock: () => this.#unlock(),
      audit: (event) => this.#auditOrOwe(event),
    });
  }

  get status(): ManagerState['status'] {
    return this.#state.status;
  }

  async start(): Promise<void> {
    this.#file = readEnrolment(this.#paths);
    // Who may write to it may replace the manager's own directory in it.
    privateDirectory(this.options.paths.run);
    this.#admin = await serveAdmin({
      path: this.#paths.adminSocket,
      log: this.#log,
      auditPath: this.#paths.audit,
      health: () => describeHealth(this.#told, this.#enrolment(), this.#instance),
      metrics: () => describeMetrics(this.#state, this.#rotation),
      doctor: () => this.#doctor(),
      service: () => this.#service(),
      erasure: (generation) => {
        const rotation = this.#currentRotation();
        return { isDone: rotation.isErased(generation), due: rotation.erasure()?.due };
      },
      platform: () => this.#platformCalls(),
      audit: (event) => this.#auditOrOwe(event),
    });
    const { kind, path } = this.#file.enrolment.tpm;
    const { tpmDeadlineMs } = this.options;
    this.#platform = await openPlatform({ kind, path }, this.#paths, this.#log, false, tpmDeadlineMs);
    try {
      await this.#unlock();
    } catch (error) {
      // Any other refusal ends the start: only this one the operator resolves with the manager's help.
      if (!isPlatformPolicy(error)) throw error;
    }
    this.#listeners.push(
      await serveWorkers(this.#paths.workerSocket, () => this.#service().registry, this.#log),
      await serveToolstack(this.#paths.toolstackSocket, () => this.#service().migrations, this.#log),
    );
    this.#log.info(
      { status: this.#state.status, vtpms: vtpmsOf(this.#state), home: this.options.paths.home },
      `the manager is ${this.#state.status}`,
    );
  }

  stop(): Promise<void> {
    this.#stopping ??= this.#end();
    return this.#stopping;
  }

  async #end(): Promise<void> {
    const service = this.#state.status === 'ready' ? this.#state.service : undefined;
    this.#lock(new ManagerError('shutting-down', 'the manager is shutting down; try again when it is back'));
    this.#ended.abort();
    await this.#unlocking;
    await this.#reopening;
    service?.stopWaiting();
    await this.#rotation?.stop();
    if (service) await this.#audit(service, { action: 'stop', verdict: 'done' });
    await service?.close();
    for (const listener of this.#listeners) await listener.close();
    await this.#admin?.close();
    this.#unlocked?.keys.wipe();
    await this.#platform?.close();
    this.releaseLock();
  }

  /**
   * Does nothing where it is done already, whatever the manager is locked for since.
   * @throws ManagerError `platform-policy`, or what is not as init left it
   */
  #unlock(): Promise<void> {
    const attempt = this.#unlocking.then(async () => {
      if (this.#unlocked || this.#stopping) return;
      try {
        await this.#tryUnlock();
      } catch (error) {
        if (!this.#unlocked && !this.#stopping) {
          this.#lock(ManagerError.from(error, 'the manager cannot be unlocked'));
        }
        throw error;
      }
    });
    this.#unlocking = attempt.catch(() => undefined);
    return attempt;
  }

  async #tryUnlock(): Promise<void> {
    const wasLocked = this.#state.status === 'locked' ? this.#state.reason : undefined;
    const tpm = this.#tpm();
    const file = readEnrolment(this.#paths);
    const unlocked = await unlock(tpm, this.#paths, file, readApprovals(this.#paths));
    const { enrolment, keys, isRotating } = unlocked;
    let opened: Opened;
    try {
      opened = await this.#openService(unlocked, undefined);
    } catch (error) {
      keys.wipe();
      throw error;
    }
    // From here on who ends the manager wipes the keys.
    this.#unlocked = unlocked;
    this.#file = file;
    this.#rotation = new Rotation({
      paths: this.#paths,
      log: this.#log,
      tpm,
      keys,
      enrolment,
      isRotating,
      service: () => this.#service(),
      eraseAfter: this.options.eraseAfter,
    });
    if (wasLocked) {
      const { code, message } = wasLocked;
      const locked = { actor: 'manager', action: 'locked', verdict: 'done' } as const;
      this.#owedToAudit.unshift({ ...locked, reason: { code, message } });
    }
    if (!(await this.#serve(opened))) return;
    const { audit } = opened.service;
    const facts = { version: VERSION, generation: String(enrolment.tpm.root.generation) };
    try {
      for (const event of this.#owedToAudit.splice(0)) await audit.append(event);
      await audit.append({ actor: 'manager', action: 'start', verdict: 'done', facts });
    } finally {
      this.#rotation.resume();
    }
  }

  /**
   * Lets workers in, when other hosts were asked whether they rescued something from here: that does not run here.
   * @returns false where the store was lost before, which is then being opened again, or the manager ended
   */
  async #serve({ service, lost }: Opened): Promise<boolean> {
    const { messenger } = service;
    const asked = messenger.askAll(this.options.askPeersMs, AbortSignal.any([this.#ended.signal, lost]));
    // Their word of this run is in effect; guests wait for the store.
    if (!this.#hasAskedPeers) await asked;
    if (this.#open !== service) return false;
    if (this.#stopping) {
      await service.close();
      return false;
    }
    this.#hasAskedPeers = true;
    this.#state = { status: 'ready', service };
    void asked.then(() => messenger.tellAll());
    return true;
  }

  /** @throws ManagerError as `openService`, and where the store is lost before it is open */
  async #openService(unlocked: Unlocked, roots: readonly Buffer[] | undefined): Promise<Opened> {
    const { keys, enrolment } = unlocked;
    const lost = new AbortController();
    let service: Service | undefined;
    service = await openService(keys, {
      paths: this.#paths,
      log: this.#log,
      storeSandbox: this.options.storeSandbox,
      storeReserve: this.options.storeReserve,
      anchorWindow: this.options.anchorWindow,
      chip: {
        tpm: () => this.#tpm(),
        enrolment: () => this.#enrolment().tpm,
        approvals: () => readApprovals(this.#paths),
      },
      counter: this.#tpm().anchorCounter(enrolment.tpm, keys.anchorAuth),
      peerAddresses: this.options.peerAddresses,
      storeRoots: roots,
      onLost: (error) => {
        lost.abort(error);
        if (service) this.#lose(unlocked, service, error);
      },
    });
    // Not everything that opens it needs the store.
    if (lost.signal.aborted) {
      await service.close().catch(() => undefined);
      throw lost.signal.reason;
    }
    this.#open = service;
    return { service, lost: lost.signal };
  }

  #lose(unlocked: Unlocked, service: Service, lost: ManagerError): void {
    // Told twice of the same loss, or of a service that another one has replaced.
    if (this.#stopping || this.#open !== service) return;
    this.#open = undefined;
    this.#lock(lost);
    this.#reopening = this.#reopening.then(() => this.#reopen(unlocked, service, lost));
  }

  /**
   * The store process is gone, or the store is not what was written. It is verified again from the beginning before
   * anything is served from it, and must be the one that was lost; until then workers hold their guests. Never rejects.
   */
  async #reopen(unlocked: Unlocked, service: Service, lost: ManagerError): Promise<void> {
    await this.#audit(service, { action: 'locked', verdict: 'done', reason: lost });
    await service.close(new ManagerError('locked', lost.message)).catch(() => undefined);
    let isPassing = false;
    for (let attempt = 0; attempt < REOPEN_AFTER_MS.length || isPassing; attempt++) {
      const pause = REOPEN_AFTER_MS[Math.min(attempt, REOPEN_AFTER_MS.length - 1)];
      await delay(pause, undefined, { signal: this.#ended.signal }).catch(() => undefined);
      if (this.#stopping) return;
      try {
        const next = await this.#openService(unlocked, service.storeRoots);
        if (!(await this.#serve(next))) return;
        this.#log.warn('the store was verified and is open again');
        for (const event of this.#owedToAudit.splice(0)) await this.#audit(next.service, event);
        await this.#audit(next.service, { action: 'start', verdict: 'done', facts: { after: lost.code } });
        this.#rotation?.resume();
        return;
      } catch (error) {
        if (this.#stopping) return;
        const reason = ManagerError.from(error, 'the store cannot be opened again');
        isPassing = PASSING.has(reason.code);
        this.#lock(reason);
      }
    }
  }

  #lock(reason: ManagerError): void {
    this.#state = { status: 'locked', reason };
    if (reason.code !== 'shutting-down') {
      this.#log.error({ reason: reason.code }, `the manager is locked: ${reason.message}`);
    }
  }

  /** Who hears `ready` connects at once, so it is not said before the sockets are there. */
  get #told(): ManagerState {
    return this.#listeners.length === 0 ? { status: 'starting' } : this.#state;
  }

  /** @throws ManagerError `locked`, `shutting-down` */
  #service(): Service {
    const state = this.#state;
    if (state.status === 'ready') return state.service;
    if (state.status === 'starting') throw new ManagerError('locked', 'the manager is starting; try again');
    if (state.reason.code === 'shutting-down') throw state.reason;
    throw new ManagerError('locked', `the manager is locked (${state.reason.code}): ${state.reason.message}`);
  }

  /** @throws ManagerError `locked`, `shutting-down` */
  #currentRotation(): Rotation {
    this.#service();
    if (!this.#rotation) throw new ManagerError('locked', 'the manager is starting; try again');
    return this.#rotation;
  }

  /** @throws ManagerError `locked` where the TPM is not open */
  #tpm(): Platform['tpm'] {
    if (!this.#platform) throw new ManagerError('locked', 'the manager is starting; try again');
    return this.#platform.tpm;
  }

  /** Works while locked too: it is what unlocks. */
  #platformCalls(): PlatformControl {
    const state = this.#state;
    if (state.status === 'locked' && state.reason.code === 'shutting-down') throw state.reason;
    this.#tpm();
    return this.#platformControl;
  }

  async #auditOrOwe(event: AuditEvent): Promise<void> {
    if (this.#state.status === 'ready') {
      await this.#state.service.audit.append(event);
      return;
    }
    if (this.#owedToAudit.length === MAX_OWED) this.#owedToAudit.shift();
    this.#owedToAudit.push({ ...event, facts: { ...event.facts, at: new Date().toISOString() } });
  }

  /** Of the manager's own life. It goes on where the log does not take it: what happens next says more. */
  async #audit(service: Service, event: Omit<AuditEvent, 'actor'> & Partial<AuditEvent>): Promise<void> {
    await service.audit.append({ actor: 'manager', ...event }).catch((error: unknown) => {
      const { code, message } = ManagerError.from(error);
      this.#log.warn({ action: event.action, reason: code }, `this is not in the audit log: ${message}`);
    });
  }

  #enrolment(): Enrolment {
    const enrolment = this.#rotation?.enrolment ?? this.#file?.enrolment;
    if (!enrolment) throw new ManagerError('locked', 'the manager is starting; try again');
    return enrolment;
  }

  async #doctor(): Promise<Finding[]> {
    const { tpm } = this.#enrolment();
    const { pcrSelection } = tpm.root;
    const expected = expectationOf(tpm, tpm, { pcrSelection, srkHandle: tpm.srkHandle });
    return judge(await this.#tpm().examine(tpm), expected);
  }
}

function isPlatformPolicy(error: unknown): boolean {
  return error instanceof ManagerError && error.code === 'platform-policy';
}
