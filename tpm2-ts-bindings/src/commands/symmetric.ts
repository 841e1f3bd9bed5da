import { tpm2b, u16, u32, yesNo } from '../codec.js';
import { command } from '../command.js';
import { tpmtTicket } from '../structures.js';

/** Part 3, section 15: symmetric primitives. */

/** `mode` is Alg.NULL for the key's own. */
export const EncryptDecrypt2 = command('EncryptDecrypt2', {
  code: 0x193,
  handles: ['!keyHandle'],
  params: { inData: tpm2b, decrypt: yesNo, mode: u16, ivIn: tpm2b },
  result: { outData: tpm2b, ivOut: tpm2b },
});

/** The ticket says that the data does not start with TPM_GENERATED_VALUE: a restricted key signs the digest with it. */
export const Hash = command('Hash', {
  code: 0x17d,
  params: { data: tpm2b, hashAlg: u16, hierarchy: u32 },
  result: { outHash: tpm2b, validation: tpmtTicket },
});

export const HMAC = command('HMAC', {
  code: 0x155,
  handles: ['!handle'],
  params: { buffer: tpm2b, hashAlg: u16 },
  result: { outHMAC: tpm2b },
});
