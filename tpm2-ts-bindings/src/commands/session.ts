import { tpm2b, u8, u16 } from '../codec.js';
import { command } from '../command.js';
import { tpmtSymDef } from '../structures.js';

/** Part 3, section 11: session commands. Sessions are opened through `openSession`. */

export const StartAuthSession = command('StartAuthSession', {
  code: 0x176,
  handles: ['tpmKey', 'bind'],
  params: { nonceCaller: tpm2b, encryptedSalt: tpm2b, sessionType: u8, symmetric: tpmtSymDef, authHash: u16 },
  resultHandles: ['sessionHandle'],
  result: { nonceTPM: tpm2b },
});

export const PolicyRestart = command('PolicyRestart', {
  code: 0x180,
  handles: ['policySession'],
  policyEffect: 'restart',
});
