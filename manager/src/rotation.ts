import { barrier, type Logger, type Paths } from 'vtpm-common';
import { readApprovals } from './approvals-file.js';
import type { AuditActor, AuditEvent } from './audit/index.js';
import { adoptNext, type Enrolment, rewriteEnrolment, writeNext } from './enrolment.js';
import { ManagerError } from './error.js';
import { resealGeneration } from './generation.js';
import { type KeyHierarchy, type RootKeys, wipe } from './keys/index.js';
import type { PolicyChoice, Removal, RootTpm } from './root-tpm/index.js';
import type { Service } from './service.js';

export interface RotationParts {
  readonly paths: Paths['manager'];
  readonly log: Logger;
  readonly tpm: RootTpm;
  readonly keys: KeyHierarchy;
  /** In force, or the next one where a rotation was interrupted. */
  readonly enrolment: Enrolment;
  readonly isRotating: boolean;
  /** Hours from a retirement to the rotation that erases; 0 never. */
  readonly eraseAfter: number;
  /** @throws ManagerError `locked` */
  service(): Service;
}

export interface RotateOptions {
  readonly actor: AuditActor;
  /** Undefined: as it is. */
  readonly policy?: PolicyChoice;
  readonly ownerAuth?: Uint8Array | undefined;
}

/** Each is proved by the TPM: the half is not in it any more. */
const ERASED: Readonly<Record<Removal, string>> = {
  removed: 'was overwritten in the TPM',
  gone: 'was gone from the TPM already',
  other: 'was gone from the TPM already, and something else is in its place',
};

const CHECK_MS = 60_000;
const HOUR_MS = 3_600_000;

/**
 * Another generation of the root key: another half in the TPM, another sealed secret and, where asked for, another
 * policy. The order makes each step repeatable wherever a crash ends it:
 *
 * 1. The next generation is made in the TPM, proved, and written beside the enrolment. Until then it is nothing.
 * 2. Both generations open. Every record is written anew under the next one, beside the saves that come in.
 * 3. The TPM has counted the store, which is under the next generation alone: its enrolment takes the place of the old.
 * 4. The old half in the TPM is overwritten. From now on no disk from before opens, whatever else somebody has.
 *
 * What fails on the way is gone on with before anything else is begun: a third generation would take away the enrolment
 * of the first while records are still under it.
 */
export class Rotation {
  #enrolment: Enrolment;
  /** The next generation is written; the store may still be under both. */
  #isHalfDone: boolean;
  #running: Promise<void> | undefined;
  /** What runs without being asked for. It never rejects. */
  #ownWork: Promise<void> | undefined;
  #timer: NodeJS.Timeout | undefined;
  /** Unix milliseconds until which nothing is tried again without being asked for. */
  #restsUntil = 0;
  #isStopping = false;

  constructor(private readonly parts: RotationParts) {
    this.#enrolment = parts.enrolment;
    this.#isHalfDone = parts.isRotating;
  }

  /** In force, or about to be. */
  get enrolment(): Enrolment {
    return this.#enrolment;
  }

  /** Under way, or interrupted and to be gone on with: a start needs both generations. */
  get isUnfinished(): boolean {
    return this.#running !== undefined || this.#isHalfDone;
  }

  /** Unix milliseconds of the oldest retirement that waits for a rotation, and when one comes by itself. */
  erasure(): { readonly since: number; readonly due: number | undefined } | undefined {
    const { keys, eraseAfter, service } = this.parts;
    const since = service().erasure.pendingSince(keys.current.keyId);
    if (since === undefined) return undefined;
    return { since, due: eraseAfter === 0 ? undefined : since + eraseAfter * HOUR_MS };
  }

  /** Whether what was under that generation of the root key is unreadable for ever, on old disks too. */
  isErased(generation: number): boolean {
    const isWaiting = this.#enrolment.erase.some((root) => root.generation === generation);
    return generation !== this.parts.keys.current.keyId && !isWaiting;
  }

  /**
   * Goes on with what was interrupted, and watches for retirements that are to be erased. Called again when the store,
   * which was lost, is open again.
   */
  resume(): void {
    clearInterval(this.#timer);
    this.#timer = setInterval(() => this.#tick(), CHECK_MS);
    this.#timer.unref();
    this.#restsUntil = 0;
    this.#tick();
  }

  /**
   * Where a rotation was interrupted, going on with it is what was asked for, unless it is for another policy. What the
   * manager does by itself is waited for: after a start it may be tidying up.
   * @throws ManagerError `busy` where somebody else has asked, `platform-policy` where the new policy would not open now, and the TPM's
   */
  async rotate(options: RotateOptions): Promise<Enrolment> {
    await this.#ownWork;
    if (this.#isStopping) throw new ManagerError('shutting-down', 'the manager is shutting down; try again');
    if (this.#running)
      throw new ManagerError('busy', 'a rotation of the root key is under way; try again later');
    await this.#run(() => this.#rotate(options));
    return this.#enrolment;
  }

  /** Waits for the step under way. What is left goes on at the next start. */
  async stop(): Promise<void> {
    this.#isStopping = true;
    clearInterval(this.#timer);
    await this.#running?.catch(() => undefined);
  }

  #run(body: () => Promise<void>): Promise<void> {
    const run = body().finally(() => {
      this.#running = undefined;
    });
    this.#running = run;
    return run;
  }

  async #rotate(options: RotateOptions): Promise<void> {
    const { actor, policy, ownerAuth } = options;
    const wasHalfDone = this.#isHalfDone;
    await this.#goOn(actor, ownerAuth);
    if (wasHalfDone && policy === undefined) return;
    const generation = String(this.#enrolment.tpm.root.generation + 1);
    const event = { actor, action: 'platform-rotate', facts: { generation } } as const;
    await this.#audit({ ...event, verdict: 'intended' });
    barrier('rotation.intended');
    try {
      await this.#begin(options);
      await this.#finish(ownerAuth);
    } catch (error) {
      const { code, message } = ManagerError.from(error);
      if (error instanceof ManagerError) error.isAudited = true;
      // Where the log is the reason, or gone with the store, the next entry is of who goes on.
      await this.#audit({ ...event, verdict: 'failed', reason: { code, message } }).catch(() => undefined);
      throw error;
    }
    await this.#audit({ ...event, verdict: 'done' });
  }

  async #goOn(actor: AuditActor, ownerAuth: Uint8Array | undefined): Promise<void> {
    if (!this.#isHalfDone) {
      if (this.#hasLeftovers) await this.#eraseOld(ownerAuth);
      return;
    }
    const generation = String(this.#enrolment.tpm.root.generation);
    await this.#finish(ownerAuth);
    await this.#audit({ actor, action: 'platform-rotate', verdict: 'done', facts: { generation } });
  }

  get #hasLeftovers(): boolean {
    return this.#enrolment.erase.length + this.#enrolment.planned.length > 0;
  }

  async #begin({ policy, ownerAuth }: RotateOptions): Promise<void> {
    const { paths, tpm, keys } = this.parts;
    const enrolment = this.#enrolment;
    const made = await tpm.nextGeneration(enrolment.tpm, {
      ...(policy && { policy }),
      approvals: readApprovals(paths),
      ...(ownerAuth && { ownerAuth }),
      beforeDefine: (planned) => this.#rewrite({ ...enrolment, planned: [...enrolment.planned, ...planned] }),
    });
    let root: RootKeys | undefined;
    try {
      const sealed = resealGeneration(made, enrolment, keys.current, enrolment.recovery.publicKey);
      ({ root } = sealed);
      const next: Enrolment = {
        ...enrolment,
        ...sealed.facts,
        erase: [...enrolment.erase, enrolment.tpm.root],
      };
      barrier('rotation.made');
      writeNext(paths, next, root.enrolmentMacKey);
      barrier('rotation.written');
      keys.advance(root);
      this.#enrolment = next;
      this.#isHalfDone = true;
    } catch (error) {
      root?.wipe();
      throw error;
    } finally {
      wipe(made.recoveryInputs, made.rootKey);
    }
  }

  async #finish(ownerAuth: Uint8Array | undefined): Promise<void> {
    const { paths, keys, service } = this.parts;
    await service().rekey(() => this.#isStopping);
    if (this.#isStopping) {
      throw new ManagerError(
        'shutting-down',
        'the manager is shutting down; it goes on with the rotation at its next start',
      );
    }
    barrier('rotation.rekeyed');
    await service().count();
    barrier('rotation.counted');
    adoptNext(paths);
    this.#isHalfDone = false;
    barrier('rotation.adopted');
    keys.forgetOlder();
    await this.#eraseOld(ownerAuth);
  }

  async #eraseOld(ownerAuth: Uint8Array | undefined): Promise<void> {
    const { tpm, log } = this.parts;
    const enrolment = this.#enrolment;
    if (enrolment.planned.length > 0) await tpm.eraseIndices(enrolment.tpm, enrolment.planned, ownerAuth);
    const removals: Removal[] = [];
    for (const old of enrolment.erase) {
      removals.push(await tpm.eraseGeneration(enrolment.tpm, old, ownerAuth));
    }
    barrier('rotation.erased');
    this.#rewrite({ ...enrolment, erase: [], planned: [] });
    barrier('rotation.ended');
    for (const removal of removals) {
      log.info(
        { generation: enrolment.tpm.root.generation, removal },
        `the old generation of the root key ${ERASED[removal]}: no older disk opens any more`,
      );
    }
  }

  #rewrite(enrolment: Enrolment): void {
    rewriteEnrolment(this.parts.paths, enrolment, this.parts.keys.current.enrolmentMacKey);
    this.#enrolment = enrolment;
  }

  async #audit(event: AuditEvent): Promise<void> {
    await this.parts.service().audit.append(event);
  }

  /** What is to be done without being asked for. */
  #tick(): void {
    if (this.#running || this.#isStopping || Date.now() < this.#restsUntil || !this.#isServed()) return;
    if (this.#hasLeftovers) {
      this.parts.log.warn('a rotation of the root key was interrupted; it goes on');
      this.#unasked(() => this.#goOn('manager', undefined));
      return;
    }
    const due = this.erasure()?.due;
    if (due === undefined || Date.now() < due) return;
    this.#unasked(() => this.#rotate({ actor: 'manager' }));
  }

  #unasked(body: () => Promise<void>): void {
    this.#ownWork = this.#run(body).catch((error: unknown) => {
      // Lost with the store: it goes on when that is open again.
      if (this.#isStopping || !this.#isServed()) return;
      this.#restsUntil = Date.now() + HOUR_MS;
      const { code, message } = ManagerError.from(error, 'the root key cannot be rotated');
      this.parts.log.error(
        { reason: code },
        `the rotation of the root key is not done: ${message}. Nothing is lost; it is tried again in an hour, and now by: vtpmctl platform rotate`,
      );
    });
  }

  #isServed(): boolean {
    try {
      this.parts.service();
      return true;
    } catch {
      return false;
    }
  }
}
