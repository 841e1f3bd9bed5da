import { concat } from './bytes.js';
import { readNvIndex, readProperty } from './client.js';
import { NV_Read } from './commands/index.js';
import { NvAttribute, Pt } from './constants.js';
import { type Authorized, type NvEntity, withPassword } from './entity.js';
import { TpmError } from './error.js';
import type { Tpm } from './tpm.js';

/** Bytes that one NV_Read gives where the TPM does not say: property NV_BUFFER_MAX is younger than TPM 2.0. */
const USUAL_NV_BUFFER = 512;

/**
 * All that an NV index holds, in as many reads as it takes. The bytes are not proved by anything: check a signature in
 * them, or read in a session of your own where it matters.
 * @param by what authorises reading, given the index; its own empty authValue unless given, as certificates have it
 * @returns undefined where the index is not defined, or was never written
 * @throws TpmError
 */
export async function readNvContent(
  tpm: Tpm,
  handle: number,
  by: (index: NvEntity) => Authorized = withPassword,
): Promise<Buffer | undefined> {
  const index = await readNvIndex(tpm, handle);
  if (index === undefined) return undefined;
  const { attributes, dataSize } = index.nvPublic.value;
  if ((attributes & NvAttribute.WRITTEN) === 0) return undefined;
  const most = (await readProperty(tpm, Pt.NV_BUFFER_MAX)) ?? USUAL_NV_BUFFER;
  const parts: Buffer[] = [];
  for (let offset = 0; offset < dataSize; ) {
    const size = Math.min(most, dataSize - offset);
    const { data } = await tpm.run(NV_Read, { authHandle: by(index), nvIndex: index }, { size, offset });
    if (data.length !== size || size === 0) {
      throw new TpmError(
        'malformed',
        `answer to TPM2_NV_Read: ${data.length} bytes where ${size} were asked`,
      );
    }
    parts.push(data);
    offset += size;
  }
  return concat(...parts);
}
