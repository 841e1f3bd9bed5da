import { type Codec, list, u16, u32 } from '../codec.js';
import { command } from '../command.js';
import { hashInfo } from '../constants.js';
import { TpmError } from '../error.js';
import { tpmlDigest, tpmlPcrSelection } from '../structures.js';

/** Part 3, section 22: platform configuration registers. */

interface TaggedDigest {
  readonly hashAlg: number;
  readonly digest: Buffer;
}

/** TPMT_HA (Part 2, 10.3.2): the algorithm says how long the digest is. */
const tpmtHa: Codec<TaggedDigest> = {
  write(writer, value) {
    if (hashInfo(value.hashAlg)?.size !== value.digest.length)
      throw new TpmError('usage', `a digest of ${value.digest.length} bytes does not fit its algorithm`);
    u16.write(writer, value.hashAlg);
    writer.bytes(value.digest);
  },
  read(reader) {
    const hashAlg = u16.read(reader);
    const size = hashInfo(hashAlg)?.size;
    if (size === undefined)
      throw new TpmError('malformed', `${reader.what}: unknown hash 0x${hashAlg.toString(16)}`);
    return { hashAlg, digest: reader.bytes(size) };
  },
};

export const PCR_Extend = command('PCR_Extend', {
  code: 0x182,
  handles: ['!pcrHandle'],
  params: { digests: list(tpmtHa) },
});

/** At most eight registers a call: `readPcrs` reads them all. */
export const PCR_Read = command('PCR_Read', {
  code: 0x17e,
  params: { pcrSelectionIn: tpmlPcrSelection },
  result: { pcrUpdateCounter: u32, pcrSelectionOut: tpmlPcrSelection, pcrValues: tpmlDigest },
});
