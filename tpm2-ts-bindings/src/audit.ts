import { concat, u32Bytes } from './bytes.js';
import type { Command, HandleEntities, HandleNames } from './command.js';
import { commandHash, responseHash } from './command-hash.js';
import { Alg, type HashInfo } from './constants.js';
import { digest, requireHash } from './crypto.js';

/**
 * The digest of an audit as a TPM computes it, of a session or of commands (Part 1, "Audit"). Compare it with the one
 * that the TPM signs: `verifySessionAudit`, `verifyCommandAudit`.
 */
export class AuditDigest {
  readonly #hash: HashInfo;
  #value: Buffer;

  /** @param hashAlg the session's hash, or the command audit's */
  constructor(hashAlg: number = Alg.SHA256) {
    this.#hash = requireHash(hashAlg);
    this.#value = Buffer.alloc(this.#hash.size);
  }

  get value(): Buffer {
    return concat(this.#value);
  }

  /** Takes a command by its hashes. They are over the bytes on the wire, so over what a session encrypted. */
  extend(cpHash: Uint8Array, rpHash: Uint8Array): void {
    this.#value = digest(this.#hash, this.#value, cpHash, rpHash);
  }

  /** Takes a command that succeeded, from what `Tpm.run` took and gave. No session may have encrypted in it. */
  take<H extends HandleNames, P, R>(
    command: Command<H, P, R>,
    handles: HandleEntities<H>,
    params: P,
    result: R,
  ): void {
    const { alg } = this.#hash;
    this.extend(commandHash(command, handles, params, alg), responseHash(command, result, alg));
  }
}

/** The digest over the codes of audited commands that `verifyCommandAudit` compares (Part 2, TPMS_COMMAND_AUDIT_INFO). */
export function auditedCommands(codes: readonly number[], hashAlg: number = Alg.SHA256): Buffer {
  const ascending = [...new Set(codes)].sort((a, b) => a - b);
  return digest(requireHash(hashAlg), ...ascending.map(u32Bytes));
}
