import { list, tpm2b, u16, u32 } from '../codec.js';
import { command } from '../command.js';
import { tpmtSignature, tpmtSigScheme } from '../structures.js';

/** Part 3, sections 18.5, 18.6 and 21: audit. What is signed stays as received. */

/** Says what a session has audited. `privacyAdminHandle` is Rh.ENDORSEMENT. The session may audit this command too. */
export const GetSessionAuditDigest = command('GetSessionAuditDigest', {
  code: 0x14d,
  handles: ['!privacyAdminHandle', '!signHandle', 'sessionHandle'],
  params: { qualifyingData: tpm2b, inScheme: tpmtSigScheme },
  result: { auditInfo: tpm2b, signature: tpmtSignature },
});

/** Says what the command audit has seen; that begins anew then. `privacyHandle` is Rh.ENDORSEMENT. */
export const GetCommandAuditDigest = command('GetCommandAuditDigest', {
  code: 0x133,
  handles: ['!privacyHandle', '!signHandle'],
  params: { qualifyingData: tpm2b, inScheme: tpmtSigScheme },
  result: { auditInfo: tpm2b, signature: tpmtSignature },
});

/**
 * Which commands the TPM audits, whoever sends them. A new `auditAlg` goes alone, with empty lists, and begins anew;
 * Alg.NULL keeps the one there is. This command itself is always audited. `auth` is Rh.OWNER or Rh.PLATFORM.
 */
export const SetCommandCodeAuditStatus = command('SetCommandCodeAuditStatus', {
  code: 0x140,
  handles: ['!auth'],
  params: { auditAlg: u16, setList: list(u32), clearList: list(u32) },
});
