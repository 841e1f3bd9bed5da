import {
  type Codec,
  captured,
  embed,
  embedded,
  list,
  sized,
  struct,
  tagged,
  tpm2b,
  u8,
  u16,
  u32,
  u64,
  type ValueOf,
  yesNo,
} from './codec.js';
import { Alg, Cap, hashInfo } from './constants.js';
import { TpmError } from './error.js';
import type { Embedded } from './wire.js';

/** Wire structures in the order and with the field names of Part 2. */

const nothing = struct({});
const hashOnly = struct({ hashAlg: u16 });

/** TPMS_PCR_SELECT with its bank: which registers of one bank. */
export interface PcrBankSelection {
  readonly hash: number;
  /** Register numbers, ascending. */
  readonly pcrs: readonly number[];
}

/** Bytes of the bit map that are sent: registers 0 to 23, what every PC client TPM has. */
const SELECT_BYTES = 3;

const tpmsPcrSelection: Codec<PcrBankSelection> = {
  write(writer, value) {
    const map = Buffer.alloc(SELECT_BYTES);
    for (const pcr of value.pcrs) {
      if (!Number.isInteger(pcr) || pcr < 0 || pcr >= 8 * SELECT_BYTES)
        throw new TpmError('usage', `there is no PCR ${pcr}`);
      map[pcr >>> 3] = (map[pcr >>> 3] ?? 0) | (1 << (pcr & 7));
    }
    u16.write(writer, value.hash);
    u8.write(writer, map.length);
    writer.bytes(map);
  },
  read(reader) {
    const hash = u16.read(reader);
    const map = reader.bytes(u8.read(reader));
    const pcrs: number[] = [];
    map.forEach((byte, at) => {
      for (let bit = 0; bit < 8; bit++) if ((byte & (1 << bit)) !== 0) pcrs.push(8 * at + bit);
    });
    return { hash, pcrs };
  },
};

export const tpmlPcrSelection = list(tpmsPcrSelection);
export type PcrSelection = ValueOf<typeof tpmlPcrSelection>;

export const tpmlDigest = list(tpm2b);

/** TPMT_SYM_DEF and TPMT_SYM_DEF_OBJECT. */
export const tpmtSymDef = tagged('algorithm', u16, {
  [Alg.NULL]: nothing,
  [Alg.AES]: struct({ keyBits: u16, mode: u16 }),
});

/** TPMT_SIG_SCHEME. */
export const tpmtSigScheme = tagged('scheme', u16, {
  [Alg.NULL]: nothing,
  [Alg.RSASSA]: hashOnly,
  [Alg.RSAPSS]: hashOnly,
  [Alg.ECDSA]: hashOnly,
  [Alg.HMAC]: hashOnly,
});

/** TPMT_RSA_SCHEME, TPMT_ECC_SCHEME and TPMT_RSA_DECRYPT. */
export const tpmtAsymScheme = tagged('scheme', u16, {
  [Alg.NULL]: nothing,
  [Alg.RSASSA]: hashOnly,
  [Alg.RSAES]: nothing,
  [Alg.RSAPSS]: hashOnly,
  [Alg.OAEP]: hashOnly,
  [Alg.ECDSA]: hashOnly,
  [Alg.ECDH]: hashOnly,
});

const tpmtKdfScheme = tagged('scheme', u16, {
  [Alg.NULL]: nothing,
  [Alg.KDF1_SP800_56A]: hashOnly,
  [Alg.KDF1_SP800_108]: hashOnly,
});

const tpmtKeyedHashScheme = tagged('scheme', u16, {
  [Alg.NULL]: nothing,
  [Alg.HMAC]: hashOnly,
  [Alg.XOR]: struct({ hashAlg: u16, kdf: u16 }),
});

/** TPMS_ECC_POINT. */
export const tpmsEccPoint = struct({ x: tpm2b, y: tpm2b });

/** TPMT_HA: the algorithm says how long the digest is. */
export const tpmtHa: Codec<TaggedDigest> = {
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

export interface TaggedDigest {
  readonly hashAlg: number;
  readonly digest: Buffer;
}

const eccParms = struct({ symmetric: tpmtSymDef, scheme: tpmtAsymScheme, curveID: u16, kdf: tpmtKdfScheme });
const rsaParms = struct({ symmetric: tpmtSymDef, scheme: tpmtAsymScheme, keyBits: u16, exponent: u32 });
const keyedHashParms = struct({ scheme: tpmtKeyedHashScheme });
const symCipherParms = struct({ sym: tpmtSymDef });

/** TPMT_PUBLIC_PARMS. */
export const tpmtPublicParms = tagged('type', u16, {
  [Alg.ECC]: struct({ parameters: eccParms }),
  [Alg.RSA]: struct({ parameters: rsaParms }),
  [Alg.KEYEDHASH]: struct({ parameters: keyedHashParms }),
  [Alg.SYMCIPHER]: struct({ parameters: symCipherParms }),
});

const publicHead = { nameAlg: u16, objectAttributes: u32, authPolicy: tpm2b };

/** TPMT_PUBLIC. */
export const tpmtPublic = tagged('type', u16, {
  [Alg.ECC]: struct({
    ...publicHead,
    parameters: eccParms,
    unique: tpmsEccPoint,
  }),
  [Alg.RSA]: struct({
    ...publicHead,
    parameters: rsaParms,
    unique: tpm2b,
  }),
  [Alg.KEYEDHASH]: struct({
    ...publicHead,
    parameters: keyedHashParms,
    unique: tpm2b,
  }),
  [Alg.SYMCIPHER]: struct({ ...publicHead, parameters: symCipherParms, unique: tpm2b }),
});
export type Public = ValueOf<typeof tpmtPublic>;
/** A public area with the bytes that its Name is over. */
export type PublicArea = Embedded<Public>;

export const tpm2bPublic = embedded(tpmtPublic);

export function publicArea(value: Public): PublicArea {
  return embed(tpmtPublic, value);
}

/** TPM2B_SENSITIVE_CREATE. */
export const tpm2bSensitiveCreate = sized(struct({ userAuth: tpm2b, data: tpm2b }));

/** TPMT_SENSITIVE: the private part of an object, of any type. */
export const tpmtSensitive = struct({
  sensitiveType: u16,
  authValue: tpm2b,
  seedValue: tpm2b,
  sensitive: tpm2b,
});
export type Sensitive = ValueOf<typeof tpmtSensitive>;

/** TPMS_CONTEXT: only the TPM that made it can read it, and only byte by byte as it made it. */
export const tpmsContext = captured(
  struct({ sequence: u64, savedHandle: u32, hierarchy: u32, contextBlob: tpm2b }),
);
export type SavedContext = ValueOf<typeof tpmsContext>;

/** TPMT_SIGNATURE. */
export const tpmtSignature = tagged('sigAlg', u16, {
  [Alg.RSASSA]: struct({ hash: u16, sig: tpm2b }),
  [Alg.RSAPSS]: struct({ hash: u16, sig: tpm2b }),
  [Alg.ECDSA]: struct({ hash: u16, signatureR: tpm2b, signatureS: tpm2b }),
});
export type Signature = ValueOf<typeof tpmtSignature>;

/** TPMT_TK_CREATION, _VERIFIED, _AUTH and _HASHCHECK: proofs only their TPM can check. */
export const tpmtTicket = struct({ tag: u16, hierarchy: u32, digest: tpm2b });
export type Ticket = ValueOf<typeof tpmtTicket>;

/** TPMS_NV_PUBLIC. */
export const tpmsNvPublic = struct({
  nvIndex: u32,
  nameAlg: u16,
  attributes: u32,
  authPolicy: tpm2b,
  dataSize: u16,
});
export type NvPublic = ValueOf<typeof tpmsNvPublic>;
export const tpm2bNvPublic = embedded(tpmsNvPublic);

/** TPMS_CLOCK_INFO. `clock` is in milliseconds. */
export const tpmsClockInfo = struct({ clock: u64, resetCount: u32, restartCount: u32, safe: yesNo });

/** TPMS_TIME_INFO. `time` is in milliseconds since the TPM got power. */
export const tpmsTimeInfo = struct({ time: u64, clockInfo: tpmsClockInfo });

/** TPMS_CAPABILITY_DATA. */
export const tpmsCapabilityData = tagged('capability', u32, {
  [Cap.ALGS]: struct({ algorithms: list(struct({ alg: u16, algProperties: u32 })) }),
  [Cap.HANDLES]: struct({ handles: list(u32) }),
  [Cap.COMMANDS]: struct({ commands: list(u32) }),
  [Cap.PCRS]: struct({ assignedPCR: tpmlPcrSelection }),
  [Cap.TPM_PROPERTIES]: struct({ properties: list(struct({ property: u32, value: u32 })) }),
  [Cap.ECC_CURVES]: struct({ curves: list(u16) }),
});
