import { u32Bytes } from './bytes.js';
import { encode } from './codec.js';
import {
  PolicyAuthValue,
  PolicyCommandCode,
  PolicyPCR,
  PolicyRestart,
  PolicySecret,
} from './commands/index.js';
import { Alg, type HashInfo } from './constants.js';
import { digest, requireHash } from './crypto.js';
import type { Authorized } from './entity.js';
import { TpmError } from './error.js';
import type { Session } from './session.js';
import { type PcrSelection, tpmlPcrSelection } from './structures.js';
import type { Tpm } from './tpm.js';

/** One assertion of a policy. A list of them gives both the digest, offline, and the commands that satisfy it. */
export type PolicyStep =
  | {
      readonly assert: 'pcr';
      readonly selection: PcrSelection;
      /** Over the values, with the policy's hash (`pcrDigest`). Needed offline; on the TPM the current values count. */
      readonly digest?: Buffer;
    }
  | { readonly assert: 'command-code'; readonly code: number }
  | { readonly assert: 'auth-value' }
  | { readonly assert: 'secret'; readonly of: Authorized; readonly policyRef?: Buffer };

const NOTHING = Buffer.alloc(0);

/** The digest to put in `authPolicy` (Part 3, section 23: each command's policyDigest update). */
export function policyDigest(steps: readonly PolicyStep[], hashAlg: number = Alg.SHA256): Buffer {
  const hash = requireHash(hashAlg);
  return steps.reduce((old: Buffer, step) => fold(hash, old, step), Buffer.alloc(hash.size));
}

function fold(hash: HashInfo, old: Buffer, step: PolicyStep): Buffer {
  switch (step.assert) {
    case 'pcr':
      if (step.digest === undefined)
        throw new TpmError('usage', 'the digest of the PCR values is needed offline');
      return digest(
        hash,
        old,
        u32Bytes(PolicyPCR.code),
        encode(tpmlPcrSelection, step.selection),
        step.digest,
      );
    case 'command-code':
      return digest(hash, old, u32Bytes(PolicyCommandCode.code), u32Bytes(step.code));
    case 'auth-value':
      return digest(hash, old, u32Bytes(PolicyAuthValue.code));
    case 'secret': {
      // Two rounds: the reference is always folded in, an empty one too (Part 3, 23.2.3, PolicyUpdate).
      const first = digest(hash, old, u32Bytes(PolicySecret.code), step.of.entity.name ?? NOTHING);
      return digest(hash, first, step.policyRef ?? NOTHING);
    }
  }
}

/** Brings a policy session to the state that satisfies `steps`, from the beginning. */
export async function runPolicy(tpm: Tpm, session: Session, steps: readonly PolicyStep[]): Promise<void> {
  await tpm.run(PolicyRestart, { policySession: session }, {});
  for (const step of steps) {
    switch (step.assert) {
      case 'pcr':
        // Without a digest the TPM takes the current values and refuses at the use.
        await tpm.run(PolicyPCR, { policySession: session }, { pcrDigest: NOTHING, pcrs: step.selection });
        break;
      case 'command-code':
        await tpm.run(PolicyCommandCode, { policySession: session }, { code: step.code });
        break;
      case 'auth-value':
        await tpm.run(PolicyAuthValue, { policySession: session }, {});
        break;
      case 'secret':
        await tpm.run(
          PolicySecret,
          { authHandle: step.of, policySession: session },
          { nonceTPM: NOTHING, cpHashA: NOTHING, policyRef: step.policyRef ?? NOTHING, expiration: 0 },
        );
        break;
    }
  }
}
