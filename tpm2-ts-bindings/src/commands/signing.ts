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
