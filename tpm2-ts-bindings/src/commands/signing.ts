import { tpm2b } from '../codec.js';
import { command } from '../command.js';
import { tpmlPcrSelection, tpmtSignature, tpmtSigScheme, tpmtTicket } from '../structures.js';

/** Part 3, sections 18 and 20: attestation and signatures. What is signed stays as received. */

export const Quote = command('Quote', {
  code: 0x158,
  handles: ['!signHandle'],
  params: { qualifyingData: tpm2b, inScheme: tpmtSigScheme, pcrSelect: tpmlPcrSelection },
  result: { quoted: tpm2b, signature: tpmtSignature },
});

/** Says with `signHandle` that the object is in this TPM. ADMIN role for `objectHandle`. */
export const Certify = command('Certify', {
  code: 0x148,
  handles: ['!objectHandle', '!signHandle'],
  params: { qualifyingData: tpm2b, inScheme: tpmtSigScheme },
  result: { certifyInfo: tpm2b, signature: tpmtSignature },
});

/** Says that this TPM made the object, and with what creation data. */
export const CertifyCreation = command('CertifyCreation', {
  code: 0x14a,
  handles: ['!signHandle', 'objectHandle'],
  params: { qualifyingData: tpm2b, creationHash: tpm2b, inScheme: tpmtSigScheme, creationTicket: tpmtTicket },
  result: { certifyInfo: tpm2b, signature: tpmtSignature },
});

/** `privacyAdminHandle` is Rh.ENDORSEMENT. */
export const GetTime = command('GetTime', {
  code: 0x14c,
  handles: ['!privacyAdminHandle', '!signHandle'],
  params: { qualifyingData: tpm2b, inScheme: tpmtSigScheme },
  result: { timeInfo: tpm2b, signature: tpmtSignature },
});

export const VerifySignature = command('VerifySignature', {
  code: 0x177,
  handles: ['keyHandle'],
  params: { digest: tpm2b, signature: tpmtSignature },
  result: { validation: tpmtTicket },
});

export const Sign = command('Sign', {
  code: 0x15d,
  handles: ['!keyHandle'],
  params: { digest: tpm2b, inScheme: tpmtSigScheme, validation: tpmtTicket },
  result: { signature: tpmtSignature },
});
