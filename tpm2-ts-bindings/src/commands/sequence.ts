import { list, tpm2b, u16, u32 } from '../codec.js';
import { command } from '../command.js';
import { tpmtHa, tpmtTicket } from '../structures.js';

/** Part 3, section 17: hashes and HMACs over more than one buffer. Name the sequence with `sequenceEntity`. */

export const HMAC_Start = command('HMAC_Start', {
  code: 0x15b,
  handles: ['!handle'],
  params: { auth: tpm2b, hashAlg: u16 },
  resultHandles: ['sequenceHandle'],
});

/** With `hashAlg` Alg.NULL an event sequence. */
export const HashSequenceStart = command('HashSequenceStart', {
  code: 0x186,
  params: { auth: tpm2b, hashAlg: u16 },
  resultHandles: ['sequenceHandle'],
});

export const SequenceUpdate = command('SequenceUpdate', {
  code: 0x15c,
  handles: ['!sequenceHandle'],
  params: { buffer: tpm2b },
});

/** Flushes the sequence. */
export const SequenceComplete = command('SequenceComplete', {
  code: 0x13e,
  handles: ['!sequenceHandle'],
  params: { buffer: tpm2b, hierarchy: u32 },
  result: { result: tpm2b, validation: tpmtTicket },
});

/** Flushes the sequence and extends `pcrHandle`, or nothing with Rh.NULL. */
export const EventSequenceComplete = command('EventSequenceComplete', {
  code: 0x185,
  handles: ['!pcrHandle', '!sequenceHandle'],
  params: { buffer: tpm2b },
  result: { results: list(tpmtHa) },
});
