import { tpm2b, u16 } from '../codec.js';
import { command } from '../command.js';

/** Part 3, section 16: random numbers. */

/** May give fewer bytes than asked for, at most the TPM's largest digest. */
export const GetRandom = command('GetRandom', {
  code: 0x17b,
  params: { bytesRequested: u16 },
  result: { randomBytes: tpm2b },
});
