import { PCR_Read } from './commands/index.js';
import { hashByName, hashInfo } from './constants.js';
import { digest, requireHash } from './crypto.js';
import { TpmError } from './error.js';
import type { Session } from './session.js';
import type { PcrSelection } from './structures.js';
import type { Tpm } from './tpm.js';

/** Reads `sha256:0,2,7` (several banks with `+`). @throws TpmError `usage` */
export function parsePcrSelection(text: string): PcrSelection {
  return text.split('+').map((part) => {
    const match = /^([a-z0-9]+):(\d{1,2}(?:,\d{1,2})*)$/.exec(part);
    const hash = hashByName(match?.[1] ?? '');
    const pcrs = [...new Set((match?.[2] ?? '').split(',').map(Number))].sort((a, b) => a - b);
    if (match === null || hash === undefined || pcrs.some((pcr) => pcr > 23)) {
      throw new TpmError('usage', `"${text.slice(0, 80)}" is no PCR selection; write it like sha256:0,2,7`);
    }
    return { hash: hash.alg, pcrs };
  });
}

export function formatPcrSelection(selection: PcrSelection): string {
  return selection
    .map(({ hash, pcrs }) => `${hashInfo(hash)?.name ?? `0x${hash.toString(16)}`}:${pcrs.join(',')}`)
    .join('+');
}

/**
 * The values of all selected registers in the order of selection, all read in the same state of the TPM.
 * @param sessions authenticate the answers
 * @throws TpmError `usage` where the TPM has no such bank or register, or they change too often to be read together
 */
export async function readPcrs(
  tpm: Tpm,
  selection: PcrSelection,
  sessions: readonly Session[] = [],
): Promise<Buffer[]> {
  // Another program may extend a register between two reads; then the counter differs and all is read again.
  for (let attempt = 0; attempt < 10; attempt++) {
    const values = await readOnce(tpm, selection, sessions);
    if (values !== undefined) return values;
  }
  throw new TpmError('usage', 'the PCRs keep changing while they are read; try again');
}

async function readOnce(
  tpm: Tpm,
  selection: PcrSelection,
  sessions: readonly Session[],
): Promise<Buffer[] | undefined> {
  const values: Buffer[] = [];
  let counter: number | undefined;
  for (const { hash, pcrs } of selection) {
    for (let rest = pcrs; rest.length > 0; ) {
      const read = await tpm.run(PCR_Read, {}, { pcrSelectionIn: [{ hash, pcrs: rest }] }, sessions);
      if (counter !== undefined && counter !== read.pcrUpdateCounter) return undefined;
      counter = read.pcrUpdateCounter;
      const got = new Set(read.pcrSelectionOut.flatMap((bank) => (bank.hash === hash ? bank.pcrs : [])));
      if (got.size === 0) {
        throw new TpmError('usage', `the TPM has no ${formatPcrSelection([{ hash, pcrs: rest }])}`);
      }
      if (got.size !== read.pcrValues.length || [...got].some((pcr) => !rest.includes(pcr))) {
        throw new TpmError('malformed', 'answer to TPM2_PCR_Read: other registers than were asked for');
      }
      values.push(...read.pcrValues);
      rest = rest.filter((pcr) => !got.has(pcr));
    }
  }
  return values;
}

/** The digest over register values that PolicyPCR and Quote use. @param hashAlg the session's or scheme's hash */
export function pcrDigest(hashAlg: number, values: readonly Buffer[]): Buffer {
  return digest(requireHash(hashAlg), ...values);
}
