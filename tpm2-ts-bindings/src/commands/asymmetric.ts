import { sized, tpm2b } from '../codec.js';
import { command } from '../command.js';
import { tpmsEccPoint, tpmtAsymScheme } from '../structures.js';

/** Part 3, section 14: asymmetric primitives. Labels end with a zero byte, which is sent. */

const tpm2bEccPoint = sized(tpmsEccPoint);

export const RSA_Encrypt = command('RSA_Encrypt', {
  code: 0x174,
  handles: ['keyHandle'],
  params: { message: tpm2b, inScheme: tpmtAsymScheme, label: tpm2b },
  result: { outData: tpm2b },
});

export const RSA_Decrypt = command('RSA_Decrypt', {
  code: 0x159,
  handles: ['!keyHandle'],
  params: { cipherText: tpm2b, inScheme: tpmtAsymScheme, label: tpm2b },
  result: { message: tpm2b },
});

export const ECDH_KeyGen = command('ECDH_KeyGen', {
  code: 0x163,
  handles: ['keyHandle'],
  result: { zPoint: tpm2bEccPoint, pubPoint: tpm2bEccPoint },
});

export const ECDH_ZGen = command('ECDH_ZGen', {
  code: 0x154,
  handles: ['!keyHandle'],
  params: { inPoint: tpm2bEccPoint },
  result: { outPoint: tpm2bEccPoint },
});
