import type { Approval, ApprovalRequest } from 'tpm2-ts-bindings';
import type { Paths } from 'vtpm-common';
import { readApprovals, writeApprovals } from './approvals-file.js';
import type { AuditActor, AuditEvent } from './audit/index.js';
import type { Enrolment } from './enrolment.js';
import { ManagerError } from './error.js';
import { isApproved, type PlatformState, type RootTpm, requestApproval } from './root-tpm/index.js';
import type { Rotation } from './rotation.js';

export interface PlatformParts {
  readonly paths: Paths['manager'];
  readonly tpm: RootTpm;
  readonly enrolment: Enrolment;
  readonly lockedBecause: ManagerError | undefined;
  /** @throws ManagerError `locked` */
  rotation(): Rotation;
  /** Tries the root key again. @throws ManagerError */
  unlock(): Promise<void>;
  audit(event: AuditEvent): Promise<void>;
}

/** What an operator sees of the platform policy. */
export interface PlatformView {
  readonly policy: 'fixed' | 'authority';
  /** PEM, where there is an authority. */
  readonly authority: string | undefined;
  /** Of the root key. */
  readonly generation: number;
  readonly pcrSelection: string;
  /** By name, `sha256:7`, in hex. */
  readonly pcrs: PlatformState['pcrs'];
  /** Whether the chip releases the root key at the values of now. */
  readonly isApproved: boolean;
  /** Of revocations. */
  readonly counter: bigint;
  readonly isRotating: boolean;
  readonly approvals: readonly (Approval & { readonly state: ApprovalState })[];
}

/** `active`: good for these values now; `ready`: good when the registers are so; `revoked`; `early`: for a revocation to come. */
export type ApprovalState = 'active' | 'ready' | 'revoked' | 'early';

/** The operator's part in the platform policy. Works while the manager is locked: it is how it is unlocked. */
export class PlatformControl {
  constructor(private readonly parts: PlatformParts) {}

  async view(): Promise<PlatformView> {
    const { enrolment, lockedBecause } = this.parts;
    const { root } = enrolment.tpm;
    const now = await this.#state();
    const approvals = this.#approvals().map((approval) => ({ ...approval, state: stateOf(approval, now) }));
    const isFixedMet = Object.entries(root.pcrValues).every(([name, value]) => now.pcrs[name] === value);
    return {
      policy: root.policy.kind,
      authority: root.policy.kind === 'authority' ? root.policy.authority : undefined,
      generation: root.generation,
      pcrSelection: root.pcrSelection,
      pcrs: now.pcrs,
      isApproved:
        root.policy.kind === 'fixed' ? isFixedMet : approvals.some(({ state }) => state === 'active'),
      counter: now.counter,
      isRotating: lockedBecause === undefined && this.parts.rotation().isRunning,
      approvals,
    };
  }

  /**
   * What the authority is to sign.
   * @param pcrs values to come, by name; those not named are as now
   * @param isNext for after the next revocation
   * @throws ManagerError `bad-request`
   */
  async request(
    label: string,
    pcrs: PlatformState['pcrs'],
    isNext: boolean,
    pcrSelection = this.parts.enrolment.tpm.root.pcrSelection,
  ): Promise<ApprovalRequest> {
    const now = await this.parts.tpm.readPlatformState(this.parts.enrolment.tpm, pcrSelection);
    for (const [name, value] of Object.entries(pcrs)) {
      const old = now.pcrs[name];
      if (old === undefined) {
        throw new ManagerError('bad-request', `PCR ${name} is not of the selection ${pcrSelection}`);
      }
      if (!/^[0-9a-f]*$/.test(value) || value.length !== old.length) {
        throw new ManagerError(
          'bad-request',
          `a value of PCR ${name} has ${old.length} hex digits, in lower case`,
        );
      }
    }
    return requestApproval(this.parts.enrolment.tpm, {
      label,
      pcrSelection,
      pcrs: { ...now.pcrs, ...pcrs },
      counter: now.counter + (isNext ? 1n : 0n),
      createdAt: new Date(),
    });
  }

  /**
   * Takes a signed approval. Unlocks a manager that waited for it.
   * @param authority PEM: before one is adopted, its approvals are collected under it
   * @throws ManagerError `bad-request` where the authority did not sign it for this installation
   */
  async approve(
    actor: AuditActor,
    approval: unknown,
    authority?: string,
  ): Promise<{ readonly isUnlocked: boolean }> {
    const checked = this.#check(approval, authority);
    this.#keep([checked]);
    await this.parts.audit({
      actor,
      action: 'platform-approve',
      verdict: 'done',
      facts: { label: checked.label, policyDigest: checked.policyDigest, counter: checked.counter },
    });
    if (this.parts.lockedBecause?.code !== 'platform-policy') return { isUnlocked: false };
    await this.parts.unlock();
    return { isUnlocked: true };
  }

  /**
   * Revokes every approval but the survivors, which were signed for the counter's next value.
   * @throws ManagerError `bad-request` where none of them is good now, which would lock this host at its next start
   */
  async revoke(
    actor: AuditActor,
    survivors: readonly unknown[],
    ownerAuth: Uint8Array | undefined,
  ): Promise<{ readonly counter: bigint; readonly revoked: readonly string[] }> {
    const { tpm, enrolment } = this.parts;
    const now = await this.#state();
    const next = now.counter + 1n;
    const checked = survivors.map((survivor) => this.#check(survivor));
    const wrong = checked.find(({ counter }) => BigInt(counter) !== next);
    if (wrong) {
      throw new ManagerError(
        'bad-request',
        `the approval "${wrong.label}" is for counter ${wrong.counter}, the survivors have to be signed for ${next}: ` +
          'vtpmctl platform predict --next',
      );
    }
    if (!checked.some((approval) => isMet(approval, now))) {
      throw new ManagerError(
        'bad-request',
        'none of the survivors is for the PCR values of now: this host would stay locked at its next start. ' +
          'Sign one for them too: vtpmctl platform predict --next',
      );
    }
    const before = this.#approvals().filter(({ counter }) => BigInt(counter) === now.counter);
    // Kept first: after a crash here both are there, and the old ones count until it is repeated.
    this.#keep(checked);
    const revoked = before.filter((old) => !checked.some((survivor) => isSame(survivor.pcrs, old.pcrs)));
    const event = {
      actor,
      action: 'platform-revoke',
      facts: { counter: String(next), survivors: String(checked.length), revoked: String(revoked.length) },
    } as const;
    await this.parts.audit({ ...event, verdict: 'intended' });
    const counter = await tpm.incrementRevocationCounter(enrolment.tpm, ownerAuth);
    await this.parts.audit({ ...event, verdict: 'done' });
    return { counter, revoked: revoked.map(({ label }) => label) };
  }

  /** Another policy for the root key, through a rotation. @throws ManagerError */
  async adopt(
    actor: AuditActor,
    policy: { readonly authority?: string; readonly pcrSelection?: string },
    ownerAuth: Uint8Array | undefined,
  ): Promise<Enrolment> {
    const { root } = this.parts.enrolment.tpm;
    const pcrSelection = policy.pcrSelection ?? root.pcrSelection;
    const { authority } = policy;
    await this.parts.audit({
      actor,
      action: 'platform-authority',
      verdict: 'intended',
      facts: { pcrSelection, policy: authority === undefined ? 'fixed' : 'authority' },
    });
    return await this.parts.rotation().rotate({
      actor,
      ownerAuth,
      policy:
        authority === undefined
          ? { kind: 'fixed', pcrSelection }
          : { kind: 'authority', authority, pcrSelection },
    });
  }

  async rotate(actor: AuditActor, ownerAuth: Uint8Array | undefined): Promise<Enrolment> {
    return await this.parts.rotation().rotate({ actor, ownerAuth });
  }

  #state(): Promise<PlatformState> {
    return this.parts.tpm.readPlatformState(this.parts.enrolment.tpm);
  }

  #approvals(): readonly Approval[] {
    return readApprovals(this.parts.paths);
  }

  /** Beside those that are there; one of the same state and counter takes the place of the other. */
  #keep(added: readonly Approval[]): void {
    const others = this.#approvals().filter(
      (old) =>
        !added.some(
          (approval) => approval.policyDigest === old.policyDigest && approval.counter === old.counter,
        ),
    );
    writeApprovals(this.parts.paths, [...others, ...added]);
  }

  #check(approval: unknown, given?: string): Approval {
    const { policy } = this.parts.enrolment.tpm.root;
    const authority = given ?? (policy.kind === 'authority' ? policy.authority : undefined);
    if (authority === undefined) {
      throw new ManagerError(
        'bad-request',
        'this installation has no policy authority yet; name its public key: vtpmctl platform adopt --authority FILE',
      );
    }
    if (!isApproved(this.parts.enrolment.tpm, authority, approval)) {
      throw new ManagerError(
        'bad-request',
        'this approval was not signed by the authority for this installation, or was changed',
      );
    }
    return approval;
  }
}

function isMet(approval: Approval, now: PlatformState): boolean {
  return Object.entries(approval.pcrs).every(([name, value]) => now.pcrs[name] === value);
}

function isSame(a: PlatformState['pcrs'], b: PlatformState['pcrs']): boolean {
  const names = new Set([...Object.keys(a), ...Object.keys(b)]);
  return [...names].every((name) => a[name] === b[name]);
}

function stateOf(approval: Approval, now: PlatformState): ApprovalState {
  const counter = BigInt(approval.counter);
  if (counter < now.counter) return 'revoked';
  if (counter > now.counter) return 'early';
  return isMet(approval, now) ? 'active' : 'ready';
}
