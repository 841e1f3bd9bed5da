import { u32, yesNo } from '../codec.js';
import { command } from '../command.js';
import { tpmsCapabilityData, tpmsTimeInfo, tpmtPublicParms } from '../structures.js';

/** Part 3, sections 29 and 30: clocks and capabilities. */

export const ReadClock = command('ReadClock', { code: 0x181, result: { currentTime: tpmsTimeInfo } });

/** Succeeds where the TPM supports these parameters of a key. */
export const TestParms = command('TestParms', { code: 0x18a, params: { parameters: tpmtPublicParms } });

export const GetCapability = command('GetCapability', {
  code: 0x17a,
  params: { capability: u32, property: u32, propertyCount: u32 },
  result: { moreData: yesNo, capabilityData: tpmsCapabilityData },
});
