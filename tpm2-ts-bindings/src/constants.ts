/** Algorithms (TPM_ALG_ID, Part 2). */
export const Alg = {
  RSA: 0x0001,
  SHA1: 0x0004,
  HMAC: 0x0005,
  AES: 0x0006,
  KEYEDHASH: 0x0008,
  XOR: 0x000a,
  SHA256: 0x000b,
  SHA384: 0x000c,
  SHA512: 0x000d,
  NULL: 0x0010,
  RSASSA: 0x0014,
  RSAES: 0x0015,
  RSAPSS: 0x0016,
  OAEP: 0x0017,
  ECDSA: 0x0018,
  ECDH: 0x0019,
  KDF1_SP800_56A: 0x0020,
  KDF1_SP800_108: 0x0022,
  ECC: 0x0023,
  SYMCIPHER: 0x0025,
  CTR: 0x0040,
  OFB: 0x0041,
  CBC: 0x0042,
  CFB: 0x0043,
} as const;

/** Elliptic curves (TPM_ECC_CURVE, Part 2). */
export const Curve = { NIST_P256: 0x0003, NIST_P384: 0x0004, NIST_P521: 0x0005 } as const;

/** Permanent handles (TPM_RH, Part 2). */
export const Rh = {
  OWNER: 0x40000001,
  NULL: 0x40000007,
  PASSWORD: 0x40000009,
  LOCKOUT: 0x4000000a,
  ENDORSEMENT: 0x4000000b,
  PLATFORM: 0x4000000c,
} as const;

/** The first byte of a handle (TPM_HT, Part 2). */
export const Ht = {
  PCR: 0x00,
  NV_INDEX: 0x01,
  HMAC_SESSION: 0x02,
  POLICY_SESSION: 0x03,
  PERMANENT: 0x40,
  TRANSIENT: 0x80,
  PERSISTENT: 0x81,
} as const;

/** Structure tags (TPM_ST, Part 2). */
export const St = {
  /** Of an error about a command whose tag no TPM 2.0 knows (Part 2, TPM_ST). */
  RSP_COMMAND: 0x00c4,
  NO_SESSIONS: 0x8001,
  SESSIONS: 0x8002,
  ATTEST_NV: 0x8014,
  ATTEST_COMMAND_AUDIT: 0x8015,
  ATTEST_SESSION_AUDIT: 0x8016,
  ATTEST_TIME: 0x8019,
  ATTEST_CERTIFY: 0x8017,
  ATTEST_QUOTE: 0x8018,
  ATTEST_CREATION: 0x801a,
  CREATION: 0x8021,
  VERIFIED: 0x8022,
  AUTH_SECRET: 0x8023,
  HASHCHECK: 0x8024,
  AUTH_SIGNED: 0x8025,
} as const;

/** Startup and shutdown types (TPM_SU). */
export const Su = { CLEAR: 0x0000, STATE: 0x0001 } as const;

/** Session types (TPM_SE). */
export const Se = { HMAC: 0x00, POLICY: 0x01, TRIAL: 0x03 } as const;

/** Capability groups (TPM_CAP, Part 2). */
export const Cap = {
  ALGS: 0,
  HANDLES: 1,
  COMMANDS: 2,
  PCRS: 5,
  TPM_PROPERTIES: 6,
  ECC_CURVES: 8,
} as const;

/** Properties (TPM_PT, Part 2). */
export const Pt = {
  FAMILY_INDICATOR: 0x100,
  LEVEL: 0x101,
  REVISION: 0x102,
  MANUFACTURER: 0x105,
  VENDOR_STRING_1: 0x106,
  FIRMWARE_VERSION_1: 0x10b,
  FIRMWARE_VERSION_2: 0x10c,
  NV_COUNTERS_MAX: 0x116,
  ORDERLY_COUNT: 0x11d,
  NV_BUFFER_MAX: 0x12c,
  PERMANENT: 0x200,
  STARTUP_CLEAR: 0x201,
  HR_LOADED: 0x203,
  NV_COUNTERS_AVAIL: 0x20b,
  LOCKOUT_COUNTER: 0x20e,
  MAX_AUTH_FAIL: 0x20f,
  LOCKOUT_INTERVAL: 0x210,
  LOCKOUT_RECOVERY: 0x211,
} as const;

/** Object attributes (TPMA_OBJECT, Part 2). */
export const ObjectAttribute = {
  fixedTPM: 1 << 1,
  stClear: 1 << 2,
  fixedParent: 1 << 4,
  sensitiveDataOrigin: 1 << 5,
  userWithAuth: 1 << 6,
  adminWithPolicy: 1 << 7,
  noDA: 1 << 10,
  encryptedDuplication: 1 << 11,
  restricted: 1 << 16,
  decrypt: 1 << 17,
  sign: 1 << 18,
} as const;

/** NV attributes (TPMA_NV, Part 2). The index type is in bits 4 to 7. Join those with READ_STCLEAR, bit 31, with `mask`. */
export const NvAttribute = {
  PPWRITE: 1 << 0,
  OWNERWRITE: 1 << 1,
  AUTHWRITE: 1 << 2,
  POLICYWRITE: 1 << 3,
  COUNTER: 1 << 4,
  BITS: 2 << 4,
  EXTEND: 4 << 4,
  PIN_FAIL: 8 << 4,
  PIN_PASS: 9 << 4,
  POLICY_DELETE: 1 << 10,
  WRITELOCKED: 1 << 11,
  WRITEALL: 1 << 12,
  WRITEDEFINE: 1 << 13,
  WRITE_STCLEAR: 1 << 14,
  GLOBALLOCK: 1 << 15,
  PPREAD: 1 << 16,
  OWNERREAD: 1 << 17,
  AUTHREAD: 1 << 18,
  POLICYREAD: 1 << 19,
  NO_DA: 1 << 25,
  ORDERLY: 1 << 26,
  CLEAR_STCLEAR: 1 << 27,
  READLOCKED: 1 << 28,
  WRITTEN: 1 << 29,
  PLATFORMCREATE: 1 << 30,
  READ_STCLEAR: 0x8000_0000,
} as const;

/** Joins flags. `|` gives a negative number where bit 31 is among them, and no field takes that. */
export function mask(...flags: readonly number[]): number {
  return flags.reduce((all, flag) => all | flag, 0) >>> 0;
}

/** Comparisons of PolicyNV and PolicyCounterTimer (TPM_EO, Part 2): what is in the TPM against the operand. */
export const Eo = {
  EQ: 0x0000,
  NEQ: 0x0001,
  SIGNED_GT: 0x0002,
  UNSIGNED_GT: 0x0003,
  SIGNED_LT: 0x0004,
  UNSIGNED_LT: 0x0005,
  SIGNED_GE: 0x0006,
  UNSIGNED_GE: 0x0007,
  SIGNED_LE: 0x0008,
  UNSIGNED_LE: 0x0009,
  BITSET: 0x000a,
  BITCLEAR: 0x000b,
} as const;

/** Session attributes (TPMA_SESSION, Part 2). `decrypt`: the TPM decrypts the first parameter it gets. */
export const SessionAttribute = {
  continueSession: 0x01,
  auditExclusive: 0x02,
  auditReset: 0x04,
  decrypt: 0x20,
  encrypt: 0x40,
  audit: 0x80,
} as const;

/** What a hash algorithm is called in node:crypto and how many bytes it gives. */
const HASHES: ReadonlyMap<number, HashInfo> = new Map([
  [Alg.SHA1, { alg: Alg.SHA1, name: 'sha1', size: 20 }],
  [Alg.SHA256, { alg: Alg.SHA256, name: 'sha256', size: 32 }],
  [Alg.SHA384, { alg: Alg.SHA384, name: 'sha384', size: 48 }],
  [Alg.SHA512, { alg: Alg.SHA512, name: 'sha512', size: 64 }],
]);

export interface HashInfo {
  readonly alg: number;
  readonly name: string;
  readonly size: number;
}

/** @returns undefined for a hash this package does not know */
export function hashInfo(alg: number): HashInfo | undefined {
  return HASHES.get(alg);
}

export function hashByName(name: string): HashInfo | undefined {
  return [...HASHES.values()].find((hash) => hash.name === name);
}

/** Curves under their names in node:crypto and in JWK, and how many bytes a coordinate has. */
const CURVES: readonly CurveInfo[] = [
  { curveID: Curve.NIST_P256, name: 'prime256v1', jwk: 'P-256', size: 32 },
  { curveID: Curve.NIST_P384, name: 'secp384r1', jwk: 'P-384', size: 48 },
  { curveID: Curve.NIST_P521, name: 'secp521r1', jwk: 'P-521', size: 66 },
];

export interface CurveInfo {
  readonly curveID: number;
  readonly name: string;
  readonly jwk: string;
  readonly size: number;
}

/** @returns undefined for a curve this package does not know */
export function curveInfo(curveID: number): CurveInfo | undefined {
  return CURVES.find((curve) => curve.curveID === curveID);
}

/** @param jwk the `crv` of a JWK */
export function curveByJwk(jwk: string | undefined): CurveInfo | undefined {
  return CURVES.find((curve) => curve.jwk === jwk);
}
