import { boxKeyPair } from 'vtpm-proto';
import { ManagerError } from './error.js';
import { openEnvelope, sealEnvelope, wipe } from './keys/index.js';

/**
 * The way back without the TPM: what the root key is made of, encrypted to a public key whose private half the operator
 * keeps offline. Made anew with each generation of the root key.
 */
export interface RecoveryBox {
  /** Hex, 32 bytes. */
  readonly publicKey: string;
  /** Base64 of an envelope (keys/envelope.ts). */
  readonly box: string;
}

const PURPOSE = 'recovery of the root key';
/** So that a file or a line of paper says what it is. */
const PREFIX = 'vtpm-recovery-1-';

/** A new recovery key: the public half to keep, and the text to show once. */
export function newRecoveryKey(): { readonly publicKey: string; readonly text: string } {
  const { publicKey, secretKey } = boxKeyPair();
  const text = PREFIX + Buffer.from(secretKey).toString('hex');
  wipe(secretKey);
  return { publicKey: Buffer.from(publicKey).toString('hex'), text };
}

/** The private half, 32 bytes; the caller wipes it. @throws ManagerError `bad-request` */
export function parseRecoveryKey(text: string): Buffer {
  const match = /^vtpm-recovery-1-([0-9a-f]{64})$/.exec(text.trim());
  if (!match?.[1]) {
    throw new ManagerError(
      'bad-request',
      `a recovery key is ${PREFIX} and 64 hex digits, as vtpmctl init or the last rotation showed it`,
    );
  }
  return Buffer.from(match[1], 'hex');
}

/** @param inputs what the root key is made of; the caller wipes it @param generation of the root key */
export function boxForRecovery(
  publicKey: string,
  installation: string,
  generation: number,
  inputs: Uint8Array,
): RecoveryBox {
  const names = { purpose: PURPOSE, associated: associated(installation, generation) };
  return {
    publicKey,
    box: sealEnvelope(Buffer.from(publicKey, 'hex'), names, inputs).toString('base64'),
  };
}

/** @returns what the root key is made of; the caller wipes it @throws ManagerError `bad-request` */
export function openRecoveryBox(
  recoveryKey: Uint8Array,
  { box }: RecoveryBox,
  installation: string,
  generation: number,
): Buffer {
  const names = { purpose: PURPOSE, associated: associated(installation, generation) };
  return openEnvelope(recoveryKey, names, Buffer.from(box, 'base64'));
}

function associated(installation: string, generation: number): Buffer {
  const number = Buffer.alloc(4);
  number.writeUInt32BE(generation);
  return Buffer.concat([Buffer.from(installation, 'hex'), number]);
}
