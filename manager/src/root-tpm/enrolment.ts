import { Alg, type PcrSelection, parsePcrSelection } from 'tpm2-ts-bindings';
import { ManagerError } from '../error.js';

/** Where the root TPM is. `unix` and `embedded` are stream sockets that carry bare TPM commands. */
export type RootTpmLocation = {
  /** `embedded`: the project's own software TPM, whose state is on the same disk. */
  kind: 'device' | 'unix' | 'embedded';
  path: string;
};

/** What is kept of an enrolment, as JSON. Nothing in it is secret; all of it is needed to release the root key. */
export interface RootTpmEnrolment {
  format: 1;
  kind: RootTpmLocation['kind'];
  path: string;
  /** Hex, 16 bytes. */
  installation: string;
  /** Four letters of the TPM's vendor. */
  manufacturer: string;
  firmwareVersion: string;
  srkHandle: number;
  /** Hex: nameAlg and digest of the public area. */
  srkName: string;
  srkCreatedByUs: boolean;
  /** `sha256:7` or `sha256:0,2,7`. */
  pcrSelection: string;
  /** Hex, 32 bytes: PolicyPCR over the selection with the values at enrolment. */
  policyDigest: string;
  /** Base64 of the TPMT_PUBLIC. */
  sealedPublic: string;
  /** Base64 of the private area, encrypted by the TPM. */
  sealedPrivate: string;
  nvHandle: number;
  /** Hex; of the index with its content written. */
  nvName: string;
}

/** Bytes of each of the two halves and of the root key. */
export const SECRET_BYTES = 32;

/** @throws ManagerError `bad-request` */
export function readSelection(text: string): PcrSelection {
  try {
    const selection = parsePcrSelection(text);
    if (selection.some((bank) => bank.hash === Alg.SHA1)) {
      throw new ManagerError('bad-request', 'SHA-1 PCRs prove nothing any more; choose the sha256 bank');
    }
    return selection;
  } catch (cause) {
    if (cause instanceof ManagerError) throw cause;
    throw new ManagerError('bad-request', (cause as Error).message, { cause });
  }
}

/** Refuses what a newer version wrote. @throws ManagerError `newer-format` */
export function checkEnrolmentFormat(enrolment: { readonly format: number }): void {
  if (enrolment.format !== 1) {
    throw new ManagerError(
      'newer-format',
      `the TPM enrolment has format ${enrolment.format}, this version knows 1; upgrade the manager`,
    );
  }
}

export function hexHandle(handle: number): string {
  return `0x${handle.toString(16).padStart(8, '0')}`;
}
