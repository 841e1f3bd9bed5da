import type { Approval, ApprovalRequest, PcrValues } from 'tpm2-ts-bindings';
import type { DaemonClient } from './http.js';

export interface ListedApproval extends Approval {
  readonly state: 'active' | 'ready' | 'revoked' | 'early' | 'other';
}

interface Reason {
  readonly code: string;
  readonly message: string;
}

/** What the manager says of the platform policy. */
export interface PlatformView {
  readonly policy: 'fixed' | 'authority';
  /** PEM. */
  readonly authority: string | null;
  readonly generation: number;
  readonly pcrSelection: string;
  readonly pcrs: PcrValues;
  readonly enrolledPcrs: PcrValues;
  readonly isApproved: boolean;
  readonly counter: string;
  readonly isRotating: boolean;
  readonly approvals: readonly ListedApproval[];
  readonly lockedBecause: Reason | null;
  readonly erasure: { readonly since: string; readonly due: string | null } | null;
}

export interface ApprovalOutcome {
  readonly approval: ListedApproval;
  readonly isUnlocked: boolean;
  readonly lockedBecause: Reason | null;
}

export interface PolicyInForce {
  readonly generation: number;
  readonly policy: 'fixed' | 'authority';
  readonly pcrSelection: string;
}

/** An approval may unlock a manager, which then reads its whole store. */
const UNLOCK_TIMEOUT_MS = 600_000;
/** A rotation writes every vTPM anew. */
const ROTATION_TIMEOUT_MS = 6 * 3_600_000;

/** The calls of the manager's admin plane on the platform policy. Errors as in DaemonClient. */
export class PlatformApi {
  readonly #client: DaemonClient;
  constructor(client: DaemonClient) {
    this.#client = client;
  }

  view(): Promise<PlatformView> {
    return this.#client.call('GET', '/platform', { timeout: UNLOCK_TIMEOUT_MS });
  }

  /** @param pcrs values to come, by name; those not named are as now */
  request(facts: {
    readonly label: string;
    readonly pcrs: PcrValues;
    readonly next: boolean;
    readonly pcrSelection: string | undefined;
  }): Promise<ApprovalRequest> {
    return this.#client.call('POST', '/platform/requests', { body: facts, timeout: UNLOCK_TIMEOUT_MS });
  }

  /** @param authority PEM, where it is not adopted yet */
  approve(approval: unknown, authority?: string): Promise<ApprovalOutcome> {
    return this.#client.call('POST', '/platform/approvals', {
      body: { approval, authority },
      timeout: UNLOCK_TIMEOUT_MS,
    });
  }

  revoke(
    survivors: readonly unknown[],
    ownerAuth: string | undefined,
  ): Promise<{ readonly counter: string; readonly revoked: readonly string[] }> {
    return this.#client.call('POST', '/platform/revocations', {
      body: { survivors, ownerAuth },
      timeout: UNLOCK_TIMEOUT_MS,
    });
  }

  /** @param change.authority PEM; null for none; undefined: as it is */
  change(
    change: { readonly authority: string | null | undefined; readonly pcrSelection: string | undefined },
    ownerAuth: string | undefined,
  ): Promise<PolicyInForce> {
    return this.#client.call('POST', '/platform/policy', {
      body: { ...change, ownerAuth },
      timeout: ROTATION_TIMEOUT_MS,
    });
  }

  rotate(ownerAuth: string | undefined): Promise<PolicyInForce> {
    return this.#client.call('POST', '/platform/rotations', {
      body: { ownerAuth },
      timeout: ROTATION_TIMEOUT_MS,
    });
  }
}
