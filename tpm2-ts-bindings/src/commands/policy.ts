import { i32, tpm2b, u32 } from '../codec.js';
import { command } from '../command.js';
import { tpmlPcrSelection, tpmtTicket } from '../structures.js';

/** Part 3, section 23: policy assertions. `runPolicy` sends them from a description that also gives the digest. */

export const PolicyPCR = command('PolicyPCR', {
  code: 0x17f,
  handles: ['policySession'],
  params: { pcrDigest: tpm2b, pcrs: tpmlPcrSelection },
});

export const PolicySecret = command('PolicySecret', {
  code: 0x151,
  handles: ['!authHandle', 'policySession'],
  params: { nonceTPM: tpm2b, cpHashA: tpm2b, policyRef: tpm2b, expiration: i32 },
  result: { timeout: tpm2b, policyTicket: tpmtTicket },
});

export const PolicyCommandCode = command('PolicyCommandCode', {
  code: 0x16c,
  handles: ['policySession'],
  params: { code: u32 },
});

export const PolicyAuthValue = command('PolicyAuthValue', {
  code: 0x16b,
  handles: ['policySession'],
  policyEffect: 'auth-value',
});

export const PolicyGetDigest = command('PolicyGetDigest', {
  code: 0x189,
  handles: ['policySession'],
  result: { policyDigest: tpm2b },
});
