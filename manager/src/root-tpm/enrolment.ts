import { Alg, type PcrSelection, type PcrValues, parsePcrSelection } from 'tpm2-ts-bindings';
import { ManagerError } from '../error.js';

/** Where the root TPM is. `unix` and `embedded` are stream sockets that carry bare TPM commands. */
export type RootTpmLocation = {
  /** `embedded`: the project's own software TPM, whose state is on the same disk. */
  kind: 'device' | 'unix' | 'embedded';
  path: string;
};

/** An NV index that this installation made, or is about to make. */
export interface NvIndexRef {
  handle: number;
  /** Hex, with its content written. The handle is part of what it is over. */
  name: string;
}

/**
 * What the chip wants before it gives out a generation of the root key: the register values at its making, or any that
 * the authority approved.
 */
export type GenerationPolicy = { kind: 'fixed' } | { kind: 'authority' /** PEM, SPKI */; authority: string };

/**
 * One generation of the root key: a sealed secret and a half in an NV index, both under one policy. A rotation, another
 * authority and another selection of registers are each a next generation; the last one goes on opening until it is
 * erased.
 */
export interface RootGeneration {
  /** From 1. */
  generation: number;
  policy: GenerationPolicy;
  /** `sha256:7` or `sha256:0,2,7`. */
  pcrSelection: string;
  /** Hex, 32 bytes: the authPolicy of sealed object and NV index. */
  policyDigest: string;
  /** At its making, for the message about what differs. */
  pcrValues: PcrValues;
  /** Base64 of the TPMT_PUBLIC. */
  sealedPublic: string;
  /** Base64 of the private area, encrypted by the TPM. */
  sealedPrivate: string;
  nvHandle: number;
  /** Hex; of the index with its content written. */
  nvName: string;
}

/** The counter that says which state of the store is the last one. */
export interface AnchorIndex extends NvIndexRef {
  /**
   * 0: each count is kept by the chip at once. Otherwise it is orderly: kept in the chip's RAM and, after a loss of power,
   * ahead of what it was by at most this much.
   */
  orderlyCount: number;
}

/** What is kept of an enrolment, as JSON. Nothing in it is secret; all of it is needed to release the root key. */
export interface RootTpmEnrolment {
  format: 2;
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
  anchor: AnchorIndex;
  /** An authority's approvals name its value; counting on revokes them. */
  revocation: NvIndexRef;
  root: RootGeneration;
}

const FORMAT = 2;
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

/** Refuses what another version wrote. @throws ManagerError `newer-format`, `older-format` */
export function checkEnrolmentFormat(enrolment: { readonly format: number }): void {
  const { format } = enrolment;
  if (format === FORMAT) return;
  const what = `the TPM enrolment has format ${format}, this version knows ${FORMAT}`;
  if (format > FORMAT) throw new ManagerError('newer-format', `${what}; upgrade the manager`);
  throw new ManagerError(
    'older-format',
    `${what}: it is older and cannot be converted. Run the version that wrote it, or uninstall with that and init again`,
  );
}

export function hexHandle(handle: number): string {
  return `0x${handle.toString(16).padStart(8, '0')}`;
}
