import { barrier, type Logger, type Paths } from 'vtpm-common';
import { readApprovals } from './approvals-file.js';
import type { AuditActor } from './audit/index.js';
import { adoptNext, type Enrolment, rewriteEnrolment, writeNext } from './enrolment.js';
import { ManagerError } from './error.js';
import {
  type KeyHierarchy,
  openInstallationSecrets,
  sealInstallationSecrets,
  wipe,
  wipeSecrets,
} from './keys/index.js';
import { boxForRecovery } from './recovery-key.js';
import type { PolicyChoice, RootTpm } from './root-tpm/index.js';
import type { Service } from './service.js';
import { rootKeysOf } from './unlock.js';

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
 */
export class Rotation {
  #enrolment: Enrolment;
  #running: Promise<void> | undefined;
  #timer: NodeJS.Timeout | undefined;
  #isStopping = false;

  constructor(private readonly parts: RotationParts) {
    this.#enrolment = parts.enrolment;
  }

  /** In force, or about to be. */
  get enrolment(): Enrolment {
    return this.#enrolment;
  }

  get isRunning(): boolean {
    return this.#running !== undefined;
  }

  /** Unix milliseconds of the oldest retirement that waits for a rotation, and when one comes by itself. */
  erasure(): { readonly since: number; readonly due: number | undefined } | undefined {
    const { keys, eraseAfter, service } = this.parts;
    const since = service().erasure.pendingSince(keys.current.keyId);
    if (since === undefined) return undefined;
    return { since, due: eraseAfter === 0 ? undefined : since + eraseAfter * HOUR_MS };
  }

  /** Goes on with what an earlier manager began, and watches for retirements that are to be erased. */
  resume(): void {
    const { isRotating, log } = this.parts;
    this.#timer = setInterval(() => this.#eraseIfDue(), CHECK_MS);
    this.#timer.unref();
    const { erase, planned } = this.#enrolment;
    if (!isRotating && erase.length + planned.length === 0) return;
    log.warn('a rotation of the root key was interrupted; it goes on');
    this.#run(async () => {
      if (isRotating) await this.#finish(undefined);
      else await this.#eraseOld(undefined);
    }).catch((error: unknown) => this.#report(error));
  }

  /** @throws ManagerError `busy`, `platform-policy` where the new policy would not open now, and the TPM's */
  async rotate(options: RotateOptions): Promise<Enrolment> {
    if (this.#running)
      throw new ManagerError('busy', 'a rotation of the root key is under way; try again later');
    await this.#run(async () => {
      const { audit } = this.parts.service();
      const generation = String(this.#enrolment.tpm.root.generation + 1);
      const { actor } = options;
      const event = { actor, action: 'platform-rotate', facts: { generation } } as const;
      await audit.append({ ...event, verdict: 'intended' });
      await this.#begin(options);
      await this.#finish(options.ownerAuth);
      await audit.append({ ...event, verdict: 'done' });
    });
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

  async #begin({ policy, ownerAuth }: RotateOptions): Promise<void> {
    const { paths, tpm, keys } = this.parts;
    const enrolment = this.#enrolment;
    const {
      recoveryInputs,
      rootKey,
      enrolment: nextTpm,
    } = await tpm.nextGeneration(enrolment.tpm, {
      ...(policy && { policy }),
      approvals: readApprovals(paths),
      ...(ownerAuth && { ownerAuth }),
      beforeDefine: (planned) => this.#rewrite({ ...enrolment, planned }),
    });
    try {
      const root = rootKeysOf(rootKey, { storeId: enrolment.storeId, tpm: nextTpm });
      const secrets = openInstallationSecrets(keys.current, Buffer.from(enrolment.keyring, 'base64'));
      const { generation } = nextTpm.root;
      const next: Enrolment = {
        ...enrolment,
        tpm: nextTpm,
        keyring: sealInstallationSecrets(root, secrets).toString('base64'),
        recovery: boxForRecovery(
          enrolment.recovery.publicKey,
          nextTpm.installation,
          generation,
          recoveryInputs,
        ),
        erase: [...enrolment.erase, enrolment.tpm.root],
        planned: [],
      };
      wipeSecrets(secrets);
      barrier('rotation.made');
      writeNext(paths, next, root.enrolmentMacKey);
      barrier('rotation.written');
      keys.advance(root);
      this.#enrolment = next;
    } finally {
      wipe(recoveryInputs, rootKey);
    }
  }

  async #finish(ownerAuth: Uint8Array | undefined): Promise<void> {
    const { paths, keys, service } = this.parts;
    await service().rekey(() => this.#isStopping);
    if (this.#isStopping) return;
    barrier('rotation.rekeyed');
    await service().count();
    barrier('rotation.counted');
    adoptNext(paths);
    barrier('rotation.adopted');
    keys.forgetOlder();
    await this.#eraseOld(ownerAuth);
  }

  async #eraseOld(ownerAuth: Uint8Array | undefined): Promise<void> {
    const { tpm, log } = this.parts;
    const enrolment = this.#enrolment;
    if (enrolment.planned.length > 0) await tpm.eraseIndices(enrolment.tpm, enrolment.planned, ownerAuth);
    for (const old of enrolment.erase) await tpm.eraseGeneration(enrolment.tpm, old, ownerAuth);
    barrier('rotation.erased');
    this.#rewrite({ ...enrolment, erase: [], planned: [] });
    if (enrolment.erase.length > 0) {
      log.info(
        { generation: enrolment.tpm.root.generation },
        'the old generation of the root key was overwritten in the TPM: no older disk opens any more',
      );
    }
  }

  #rewrite(enrolment: Enrolment): void {
    rewriteEnrolment(this.parts.paths, enrolment, this.parts.keys.current.enrolmentMacKey);
    this.#enrolment = enrolment;
  }

  #eraseIfDue(): void {
    try {
      const due = this.erasure()?.due;
      if (this.#running || this.#isStopping || due === undefined || Date.now() < due) return;
    } catch {
      // Locked: nobody rotates anything.
      return;
    }
    this.rotate({ actor: 'manager' }).catch((error: unknown) => this.#report(error));
  }

  #report(error: unknown): void {
    const { code, message } = ManagerError.from(error, 'the root key cannot be rotated');
    this.parts.log.error(
      { reason: code },
      `the rotation of the root key is not done: ${message}. Nothing is lost; go on with vtpmctl platform rotate`,
    );
  }
}
