import { i32, tpm2b, u8, u16, u32, yesNo } from '../codec.js';
import { command } from '../command.js';
import { tpmlDigest, tpmlPcrSelection, tpmtSignature, tpmtTicket } from '../structures.js';

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

/** Folds in the same as PolicyAuthValue; the use then carries the authValue itself instead of an HMAC. */
export const PolicyPassword = command('PolicyPassword', {
  code: 0x18c,
  handles: ['policySession'],
  policyEffect: 'password',
});

export const PolicySigned = command('PolicySigned', {
  code: 0x160,
  handles: ['authObject', 'policySession'],
  params: { nonceTPM: tpm2b, cpHashA: tpm2b, policyRef: tpm2b, expiration: i32, auth: tpmtSignature },
  result: { timeout: tpm2b, policyTicket: tpmtTicket },
});

export const PolicyTicket = command('PolicyTicket', {
  code: 0x172,
  handles: ['policySession'],
  params: { timeout: tpm2b, cpHashA: tpm2b, policyRef: tpm2b, authName: tpm2b, ticket: tpmtTicket },
});

/** Two to eight digests. */
export const PolicyOR = command('PolicyOR', {
  code: 0x171,
  handles: ['policySession'],
  params: { pHashList: tpmlDigest },
});

export const PolicyAuthorize = command('PolicyAuthorize', {
  code: 0x16a,
  handles: ['policySession'],
  params: { approvedPolicy: tpm2b, policyRef: tpm2b, keySign: tpm2b, checkTicket: tpmtTicket },
});

export const PolicyNV = command('PolicyNV', {
  code: 0x149,
  handles: ['!authHandle', 'nvIndex', 'policySession'],
  params: { operandB: tpm2b, offset: u16, operation: u16 },
});

export const PolicyCounterTimer = command('PolicyCounterTimer', {
  code: 0x16d,
  handles: ['policySession'],
  params: { operandB: tpm2b, offset: u16, operation: u16 },
});

export const PolicyLocality = command('PolicyLocality', {
  code: 0x16f,
  handles: ['policySession'],
  params: { locality: u8 },
});

export const PolicyNvWritten = command('PolicyNvWritten', {
  code: 0x18f,
  handles: ['policySession'],
  params: { writtenSet: yesNo },
});

export const PolicyCpHash = command('PolicyCpHash', {
  code: 0x16e,
  handles: ['policySession'],
  params: { cpHashA: tpm2b },
});

export const PolicyNameHash = command('PolicyNameHash', {
  code: 0x170,
  handles: ['policySession'],
  params: { nameHash: tpm2b },
});

export const PolicyTemplate = command('PolicyTemplate', {
  code: 0x190,
  handles: ['policySession'],
  params: { templateHash: tpm2b },
});

export const PolicyDuplicationSelect = command('PolicyDuplicationSelect', {
  code: 0x188,
  handles: ['policySession'],
  params: { objectName: tpm2b, newParentName: tpm2b, includeObject: yesNo },
});

export const PolicyGetDigest = command('PolicyGetDigest', {
  code: 0x189,
  handles: ['policySession'],
  result: { policyDigest: tpm2b },
});
