import { concat } from './bytes.js';
import { encode, i32 } from './codec.js';
import type { Authorized, NvEntity } from './entity.js';
import type { PcrSelection, PublicArea, Signature, Ticket } from './structures.js';

/**
 * One assertion of a policy. A list of them gives both the digest, offline (`policyDigest`), and the commands that
 * satisfy it (`runPolicy`). With a name, the steps of that kind.
 */
export type PolicyStep<K extends AnyPolicyStep['assert'] = AnyPolicyStep['assert']> = Extract<
  AnyPolicyStep,
  { readonly assert: K }
>;

/** The assertions of a policy, by their kind. */
export type AnyPolicyStep =
  | {
      readonly assert: 'pcr';
      readonly selection: PcrSelection;
      /** Over the values, with the policy's hash (`pcrDigest`). Needed offline; on the TPM the current values count. */
      readonly digest?: Buffer;
    }
  | { readonly assert: 'command-code'; readonly code: number }
  | { readonly assert: 'auth-value' }
  /** Same digest as `auth-value`, but the use sends the authValue as it is, and no HMAC proves its answer. */
  | { readonly assert: 'password' }
  | ({ readonly assert: 'secret'; readonly of: Authorized } & PolicyLimits)
  | ({
      readonly assert: 'signed';
      /** Any key that node:crypto or a TPM signs with; loaded for the time of the command. */
      readonly signer: PublicArea;
      /** Signs `signedPolicyMessage`, which holds the session's nonce: a signature is good for one session. */
      readonly sign: (message: Buffer) => Signature | Promise<Signature>;
    } & PolicyLimits)
  /** What `runPolicy` returns for a `secret` or `signed` with a negative expiration. */
  | {
      readonly assert: 'ticket';
      /** Of the entity or key that authorised. */
      readonly name: Buffer;
      readonly timeout: Buffer;
      readonly ticket: Ticket;
      readonly policyRef?: Buffer;
      readonly cpHash?: Buffer;
    }
  /** Any policy that the key approved: see `approvalMessage`. Steps before it are part of the approved one. */
  | {
      readonly assert: 'authorize';
      readonly signer: PublicArea;
      readonly policyRef?: Buffer;
      /** Needed on the TPM only, so that a digest can be made before anything is approved. */
      readonly approved?: { readonly policy: readonly PolicyStep[]; readonly signature: Signature };
    }
  /** One of at least two policies; more than eight are nested. */
  | {
      readonly assert: 'or';
      /** Each after the steps before this one. One that is never taken here can be given as its digest. */
      readonly branches: readonly (readonly PolicyStep[] | Buffer)[];
      /** Index of the branch to satisfy. Needed on the TPM. */
      readonly take?: number;
    }
  | {
      readonly assert: 'nv';
      readonly index: NvEntity;
      /** What authorises reading it. */
      readonly by: Authorized;
      readonly operand: Buffer;
      readonly offset?: number;
      /** `Eo`: content of the index against operand. */
      readonly operation: number;
    }
  | { readonly assert: 'nv-written'; readonly written: boolean }
  /** `commandHash` of the one command that is allowed. */
  | { readonly assert: 'cp-hash'; readonly cpHash: Buffer }
  /** `nameHash` of the handles of the command. */
  | { readonly assert: 'name-hash'; readonly nameHash: Buffer }
  /** Hash of the template that Create, CreatePrimary or CreateLoaded may get. */
  | { readonly assert: 'template'; readonly templateHash: Buffer }
  /** Bits 0 to 4 for the localities 0 to 4; from 32 on an extended locality. */
  | { readonly assert: 'locality'; readonly locality: number }
  /** `offset` into TPMS_TIME_INFO: 0 time, 8 clock, 16 resetCount, 20 restartCount, 24 safe. */
  | {
      readonly assert: 'counter-timer';
      readonly operand: Buffer;
      readonly offset: number;
      readonly operation: number;
    }
  /** Duplicate to that parent only. Without includeObject any object, and `objectName` is not in the digest. */
  | {
      readonly assert: 'duplication-select';
      readonly newParentName: Buffer;
      readonly includeObject: boolean;
      readonly objectName?: Buffer;
    };

/** What narrows an authorisation by a secret or signature. */
export interface PolicyLimits {
  readonly policyRef?: Buffer;
  /** Only for the command with this `commandHash`. Not part of the policy's digest. */
  readonly cpHash?: Buffer;
  /** Seconds from the session's start, negative to get a ticket. Not part of the policy's digest. */
  readonly expiration?: number;
}

/** What the signer of a `signed` step signs, with the hash of its scheme (Part 3, 23.3: aHash). */
export function signedPolicyMessage(
  step: Pick<PolicyStep<'signed'>, 'policyRef' | 'cpHash' | 'expiration'>,
  nonceTpm: Buffer,
): Buffer {
  const nothing = new Uint8Array(0);
  return concat(
    nonceTpm,
    encode(i32, step.expiration ?? 0),
    step.cpHash ?? nothing,
    step.policyRef ?? nothing,
  );
}

/** What the signer of an `authorize` step signs, with the hash of its nameAlg, to approve a policy (Part 3, 23.16). */
export function approvalMessage(policyDigest: Buffer, policyRef?: Buffer): Buffer {
  return concat(policyDigest, policyRef ?? new Uint8Array(0));
}
