import {
  flush,
  Ht,
  listHandles,
  Pt,
  Rc,
  readProperty,
  Startup,
  Su,
  type Tpm,
  TpmError,
} from 'tpm2-ts-bindings';
import { ManagerError } from '../error.js';
import type { RootTpmLocation } from './enrolment.js';

/** Brings a software TPM that waits for TPM2_Startup into service, and refuses a chip in that state. */
export async function start(tpm: Tpm, location: RootTpmLocation): Promise<void> {
  try {
    await readProperty(tpm, Pt.MANUFACTURER);
  } catch (error) {
    if (!TpmError.is(error, Rc.INITIALIZE)) throw error;
    if (location.kind === 'device') {
      throw new ManagerError(
        'tpm-fault',
        `${location.path} was not started by the firmware; enable it in the firmware's settings and boot again`,
        { cause: error },
      );
    }
    await tpm.run(Startup, {}, { startupType: Su.CLEAR });
  }
}

/** Removes all transient objects and loaded sessions. Only for a TPM that has no other user. */
export async function flushLeftovers(tpm: Tpm): Promise<void> {
  for (const type of [Ht.TRANSIENT, Ht.HMAC_SESSION, Ht.POLICY_SESSION]) {
    for (const handle of await listHandles(tpm, type)) await flush(tpm, handle);
  }
}

/** Vendor and firmware, for people. */
export async function identify(tpm: Tpm): Promise<{ manufacturer: string; firmwareVersion: string }> {
  const vendor = (await readProperty(tpm, Pt.MANUFACTURER)) ?? 0;
  const high = (await readProperty(tpm, Pt.FIRMWARE_VERSION_1)) ?? 0;
  const low = (await readProperty(tpm, Pt.FIRMWARE_VERSION_2)) ?? 0;
  const letters = Buffer.alloc(4);
  letters.writeUInt32BE(vendor);
  return {
    manufacturer: letters
      .toString('latin1')
      .replaceAll(/[^\x20-\x7e]/g, '')
      .trim(),
    firmwareVersion: [high >>> 16, high & 0xffff, low >>> 16, low & 0xffff].join('.'),
  };
}
