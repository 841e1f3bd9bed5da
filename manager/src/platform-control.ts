import type { Approval, ApprovalRequest } from 'tpm2-ts-bindings';
import { barrier, type Paths } from 'vtpm-common';
import { readApprovals, writeApprovals } from './approvals-file.js';
import type { AuditActor, AuditEvent } from './audit/index.js';
import type { Enrolment } from './enrolment.js';
import { ManagerError } from './error.js';
import {
  isApproved,
  type PlatformState,
  type PolicyChoice,
  type RootTpm,
  readAuthority,
  requestApproval,
} from './root-tpm/index.js';
import type { Rotation } from './rotation.js';

export interface PlatformParts {
  readonly paths: Paths['manager'];
  /** @throws ManagerError `locked` */
  tpm(): RootTpm;
  /** In force, or about to be. */
  enrolment(): Enrolment;
  isReady(): boolean;
  lockedBecause(): ManagerError | undefined;
  /** A rotation is under way or was interrupted: a start needs two generations of the root key. */
  isRotating(): boolean;
  /** @throws ManagerError `locked` */
  rotation(): Rotation;
  /** Tries the root key again where it was never released; after those who try it already. @throws ManagerError */
  unlock(): Promise<void>;
  /** Written down now, or when the log can be opened. */
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
  /** Now: by name, `sha256:7`, in hex. */
  readonly pcrs: PlatformState['pcrs'];
  /** When this generation was made: what a fixed policy wants. */
  readonly enrolledPcrs: PlatformState['pcrs'];
  /** Whether the chip releases the root key at the values of now. */
  readonly isApproved: boolean;
  /** Of revocations. */
  readonly counter: bigint;
  readonly isRotating: boolean;
  readonly approvals: readonly ListedApproval[];
  readonly lockedBecause: ManagerError | undefined;
  /** Retired vTPMs that wait for a rotation; undefined where there are none, or it cannot be known. */
  readonly erasure: ReturnType<Rotation['erasure']>;
}

export type ListedApproval = Approval & { readonly state: ApprovalState };

/**
 * `active`: good for these values now; `ready`: good when the registers are so; `revoked`; `early`: for a revocation to
 * come; `other`: of another authority or selection of registers than the generation in force has.
 */
export type ApprovalState = 'active' | 'ready' | 'revoked' | 'early' | 'other';

export interface PolicyChange {
  /** PEM of another authority, or the same again; null for none. Undefined: as it is. */
  readonly authority?: string | null;
  /** Undefined: as it is. */
  readonly pcrSelection?: string;
}

export interface ApprovalOutcome {
  readonly approval: ListedApproval;
  /** By this call. */
  readonly isUnlocked: boolean;
  /** Where it is locked all the same. */
  readonly lockedBecause: ManagerError | undefined;
}

/** The operator's part in the platform policy. Works while the manager is locked: it is how it is unlocked. */
export class PlatformControl {
  /** Changes of what is approved, one after the other. */
  #last: Promise<unknown> = Promise.resolve();

  constructor(private readonly parts: PlatformParts) {}

  async view(): Promise<PlatformView> {
    const { root } = this.parts.enrolment().tpm;
    const now = await this.#state();
    const approvals = this.#approvals().map((approval) => this.#listed(approval, now));
    const isFixedMet = isSame(root.pcrValues, now.pcrs);
    return {
      policy: root.policy.kind,
      authority: root.policy.kind === 'authority' ? root.policy.authority : undefined,
      generation: root.generation,
      pcrSelection: root.pcrSelection,
      pcrs: now.pcrs,
      enrolledPcrs: root.pcrValues,
      isApproved:
        root.policy.kind === 'fixed' ? isFixedMet : approvals.some(({ state }) => state === 'active'),
      counter: now.counter,
      isRotating: this.parts.isRotating(),
      approvals,
      lockedBecause: this.parts.lockedBecause(),
      erasure: this.parts.isReady() ? this.parts.rotation().erasure() : undefined,
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
    pcrSelection = this.parts.enrolment().tpm.root.pcrSelection,
  ): Promise<ApprovalRequest> {
    const { tpm } = this.parts.enrolment();
    const now = await this.parts.tpm().readPlatformState(tpm, pcrSelection);
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
    return requestApproval(tpm, {
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
  async approve(actor: AuditActor, approval: unknown, authority?: string): Promise<ApprovalOutcome> {
    const checked = this.#check(approval, authority);
    const { label, policyDigest, counter } = checked;
    const event = { actor, action: 'platform-approve', facts: { label, policyDigest, counter } } as const;
    await this.#audited(event, async () => this.#keep([checked]));
    const isUnlocked = await this.#tryUnlock();
    const listed = this.#listed(checked, await this.#state());
    return { approval: listed, isUnlocked, lockedBecause: this.parts.lockedBecause() };
  }

  /**
   * Revokes every approval but the survivors, which were signed for the counter's next value.
   * @throws ManagerError `bad-request` where none of them is good now, which would lock this host at its next start;
   * `busy` while the root key is rotated
   */
  revoke(
    actor: AuditActor,
    survivors: readonly unknown[],
    ownerAuth: Uint8Array | undefined,
  ): Promise<{ readonly counter: bigint; readonly revoked: readonly string[] }> {
    return this.#inTurn(async () => {
      const enrolment = this.parts.enrolment();
      if (enrolment.tpm.root.policy.kind === 'fixed') throw noAuthority();
      // The other generation may be under another authority: its approvals would die with the rest.
      if (this.parts.isRotating()) {
        throw new ManagerError(
          'busy',
          'a rotation of the root key is under way, which needs the approvals of now; ' +
            'try again when vtpmctl platform show says that it is done',
        );
      }
      const now = await this.#state();
      const next = now.counter + 1n;
      const checked = survivors.map((survivor) => this.#check(survivor));
      this.#checkSurvivors(checked, now, next);
      const before = this.#approvals().filter((old) => isOneOf(this.#listed(old, now), 'active', 'ready'));
      const revoked = before.filter((old) => !checked.some((survivor) => isSame(survivor.pcrs, old.pcrs)));
      const facts = {
        counter: String(next),
        survivors: String(checked.length),
        revoked: String(revoked.length),
      };
      const event = { actor, action: 'platform-revoke', facts } as const;
      const counter = await this.#audited(event, () => {
        // Kept first: after a crash here both are there, and the old ones count until it is repeated.
        this.#keep(checked);
        return this.parts.tpm().incrementRevocationCounter(enrolment.tpm, ownerAuth);
      });
      await this.#tryUnlock();
      return { counter, revoked: revoked.map(({ label }) => label) };
    });
  }

  /** Another policy for the root key, through a rotation. @throws ManagerError */
  adopt(actor: AuditActor, change: PolicyChange, ownerAuth: Uint8Array | undefined): Promise<Enrolment> {
    return this.#inTurn(async () => {
      const rotation = this.parts.rotation();
      const { root } = this.parts.enrolment().tpm;
      const { pcrSelection = root.pcrSelection } = change;
      const now = root.policy.kind === 'authority' ? root.policy.authority : null;
      const { authority = now } = change;
      const policy: PolicyChoice =
        authority === null
          ? { kind: 'fixed', pcrSelection }
          : { kind: 'authority', authority: readAuthority(authority), pcrSelection };
      await this.parts.audit({
        actor,
        action: 'platform-authority',
        verdict: 'intended',
        facts: { pcrSelection, policy: policy.kind },
      });
      return await rotation.rotate({ actor, ownerAuth, policy });
    });
  }

  rotate(actor: AuditActor, ownerAuth: Uint8Array | undefined): Promise<Enrolment> {
    return this.#inTurn(() => this.parts.rotation().rotate({ actor, ownerAuth }));
  }

  /** Nothing is done of which the log does not say that it was meant to be. */
  async #audited<T>(event: Omit<AuditEvent, 'verdict'>, body: () => Promise<T>): Promise<T> {
    await this.parts.audit({ ...event, verdict: 'intended' });
    try {
      const result = await body();
      barrier('platform.done');
      await this.parts.audit({ ...event, verdict: 'done' });
      return result;
    } catch (error) {
      const { code, message } = ManagerError.from(error);
      if (error instanceof ManagerError) error.isAudited = true;
      await this.parts.audit({ ...event, verdict: 'failed', reason: { code, message } });
      throw error;
    }
  }

  #inTurn<T>(body: () => Promise<T>): Promise<T> {
    const turn = this.#last.then(body);
    this.#last = turn.catch(() => undefined);
    return turn;
  }

  /** @returns whether it was locked, and is not any more */
  async #tryUnlock(): Promise<boolean> {
    if (this.parts.isReady()) return false;
    try {
      await this.parts.unlock();
    } catch (error) {
      // What was asked for is done; why it is locked all the same is told beside it.
      if (!(error instanceof ManagerError)) throw error;
    }
    return this.parts.isReady();
  }

  #checkSurvivors(survivors: readonly Approval[], now: PlatformState, next: bigint): void {
    const wrong = survivors.find(({ counter }) => BigInt(counter) !== next);
    if (wrong) {
      throw new ManagerError(
        'bad-request',
        `the approval "${wrong.label}" is for counter ${wrong.counter}, the survivors have to be signed for ${next}: ` +
          'vtpmctl platform predict --next',
      );
    }
    const after = { ...now, counter: next };
    if (!survivors.some((approval) => this.#listed(approval, after).state === 'active')) {
      throw new ManagerError(
        'bad-request',
        'none of the survivors is for the PCR values of now: this host would stay locked at its next start. ' +
          'Sign one for them too: vtpmctl platform predict --next',
      );
    }
  }

  #listed(approval: Approval, now: PlatformState): ListedApproval {
    const { tpm } = this.parts.enrolment();
    const { policy, pcrSelection } = tpm.root;
    const isOurs =
      policy.kind === 'authority' &&
      approval.pcrSelection === pcrSelection &&
      isApproved(tpm, policy.authority, approval);
    return { ...approval, state: isOurs ? stateOf(approval, now) : 'other' };
  }

  #state(): Promise<PlatformState> {
    return this.parts.tpm().readPlatformState(this.parts.enrolment().tpm);
  }

  #approvals(): readonly Approval[] {
    return readApprovals(this.parts.paths);
  }

  /** Beside those that are there; one of the same policy, which has state and counter in it, takes the place of the other. */
  #keep(added: readonly Approval[]): void {
    const others = this.#approvals().filter(
      (old) => !added.some(({ policyDigest }) => policyDigest === old.policyDigest),
    );
    writeApprovals(this.parts.paths, [...others, ...added]);
  }

  #check(approval: unknown, given?: string): Approval {
    const { tpm } = this.parts.enrolment();
    const { policy } = tpm.root;
    const authority = given ?? (policy.kind === 'authority' ? policy.authority : undefined);
    if (authority === undefined) throw noAuthority();
    if (!isApproved(tpm, authority, approval)) {
      throw new ManagerError(
        'bad-request',
        'this approval was not signed by the authority for this installation, or was changed',
      );
    }
    return approval;
  }
}

function noAuthority(): ManagerError {
  return new ManagerError(
    'bad-request',
    'this installation has no policy authority yet; name its public key: vtpmctl platform adopt --authority FILE',
  );
}

function isOneOf({ state }: ListedApproval, ...states: readonly ApprovalState[]): boolean {
  return states.includes(state);
}

function isSame(a: PlatformState['pcrs'], b: PlatformState['pcrs']): boolean {
  const names = new Set([...Object.keys(a), ...Object.keys(b)]);
  return [...names].every((name) => a[name] === b[name]);
}

function stateOf(approval: Approval, now: PlatformState): ApprovalState {
  const counter = BigInt(approval.counter);
  if (counter < now.counter) return 'revoked';
  if (counter > now.counter) return 'early';
  return isSame(approval.pcrs, now.pcrs) ? 'active' : 'ready';
}
