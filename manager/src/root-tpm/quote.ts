import {
  Alg,
  encode,
  NV_Certify,
  parseAttest,
  pcrDigest,
  Quote,
  readPcrs,
  type Signature,
  St,
  type Tpm,
  tpmtSignature,
  withPassword,
  withSession,
} from 'tpm2-ts-bindings';
import { ManagerError } from '../error.js';
import { attesting } from './attestation-key.js';
import { type RootTpmEnrolment, readSelection } from './enrolment.js';
import { enrolledRevocation } from './nv-counter.js';

/** Statements of the chip for another host, each over 32 bytes that the other one had a part in. */

/** What the chip signed, as it gave it out: TPMS_ATTEST and TPMT_SIGNATURE. */
export interface StatementBytes {
  readonly attest: Buffer;
  readonly signature: Buffer;
}

export interface QuoteBytes extends StatementBytes {
  /** In the order of selection. */
  readonly pcrValues: Buffer[];
}

/** Bytes of what a statement is over. */
const QUALIFYING_BYTES = 32;
/** The key's own scheme. */
export const OWN_SCHEME = { scheme: Alg.NULL } as const;
/** Something, a kernel's measurement log for instance, may extend a PCR between reading and quoting: then once more. */
const QUOTE_ATTEMPTS = 5;

export function quote(
  tpm: Tpm,
  enrolment: RootTpmEnrolment,
  blob: Uint8Array,
  pcrSelection: string,
  qualifying: Uint8Array,
): Promise<QuoteBytes> {
  const qualifyingData = checkQualifying(qualifying);
  const pcrSelect = readSelection(pcrSelection);
  return attesting(tpm, enrolment, blob, async ({ session, key }) => {
    for (let attempt = 1; ; attempt++) {
      const pcrValues = await readPcrs(tpm, pcrSelect, [session]);
      const { quoted, signature } = await tpm.run(
        Quote,
        { signHandle: withSession(key, session) },
        { qualifyingData, inScheme: OWN_SCHEME, pcrSelect },
      );
      if (isOver(quoted, pcrValues)) return { ...statement(quoted, signature), pcrValues };
      if (attempt === QUOTE_ATTEMPTS) {
        throw new ManagerError(
          'tpm-busy',
          'the PCRs keep changing while they are quoted: find what extends them, and try again',
        );
      }
    }
  });
}

/** What the revocation counter shows. @throws ManagerError `tpm-emptied`, `tpm-changed` */
export function certifyRevocation(
  tpm: Tpm,
  enrolment: RootTpmEnrolment,
  blob: Uint8Array,
  qualifying: Uint8Array,
): Promise<StatementBytes> {
  const qualifyingData = checkQualifying(qualifying);
  return attesting(tpm, enrolment, blob, async ({ session, key }) => {
    const nvIndex = await enrolledRevocation(tpm, enrolment);
    const { certifyInfo, signature } = await tpm.run(
      NV_Certify,
      { signHandle: withSession(key, session), authHandle: withPassword(nvIndex), nvIndex },
      { qualifyingData, inScheme: OWN_SCHEME, size: nvIndex.nvPublic.value.dataSize, offset: 0 },
    );
    return statement(certifyInfo, signature);
  });
}

/** @throws ManagerError `bad-request` */
export function checkQualifying(qualifying: Uint8Array): Buffer {
  if (qualifying.length !== QUALIFYING_BYTES) {
    throw new ManagerError(
      'bad-request',
      `what a TPM states something about has ${QUALIFYING_BYTES} bytes here`,
    );
  }
  return Buffer.from(qualifying);
}

export function statement(attest: Buffer, signature: Signature): StatementBytes {
  return { attest, signature: encode(tpmtSignature, signature) };
}

function isOver(quoted: Buffer, values: readonly Buffer[]): boolean {
  const attest = parseAttest(quoted);
  return attest.type === St.ATTEST_QUOTE && attest.attested.pcrDigest.equals(pcrDigest(Alg.SHA256, values));
}
