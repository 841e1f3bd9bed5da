import { list, u32, yesNo } from '../codec.js';
import { command } from '../command.js';
import { tpmlDigest, tpmlPcrSelection, tpmtHa } from '../structures.js';

/** Part 3, section 22: platform configuration registers. */

export const PCR_Extend = command('PCR_Extend', {
  code: 0x182,
  handles: ['!pcrHandle'],
  params: { digests: list(tpmtHa) },
});

/** Only debug (16) and application (23) registers, others at some localities only (PC Client Platform TPM Profile). */
export const PCR_Reset = command('PCR_Reset', { code: 0x13d, handles: ['!pcrHandle'] });

/** At most eight registers a call: `readPcrs` reads them all. */
export const PCR_Read = command('PCR_Read', {
  code: 0x17e,
  params: { pcrSelectionIn: tpmlPcrSelection },
  result: { pcrUpdateCounter: u32, pcrSelectionOut: tpmlPcrSelection, pcrValues: tpmlDigest },
});

/**
 * Which registers each bank has from the next _TPM_Init on; a bank that is not named stays as it is. Where the TPM cannot do
 * it, it says so in `allocationSuccess`, not by an error.
 */
export const PCR_Allocate = command('PCR_Allocate', {
  code: 0x12b,
  handles: ['!authHandle'],
  params: { pcrAllocation: tpmlPcrSelection },
  result: { allocationSuccess: yesNo, maxPcr: u32, sizeNeeded: u32, sizeAvailable: u32 },
});
