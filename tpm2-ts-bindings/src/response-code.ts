/** A response code taken apart (Part 2, "TPM_RC"). */
export interface ResponseCode {
  /** As received, with the layer bits of a resource manager. */
  readonly rc: number;
  /** Without handle, parameter or session number: compare with `Rc`. */
  readonly canonical: number;
  readonly name: string;
  /** What it means; empty for a code that is not in `Rc`. */
  readonly text: string;
  readonly subject: 'handle' | 'parameter' | 'session' | undefined;
  /** From 1; 0 where the TPM did not say which. */
  readonly index: number;
  /** The same command may succeed later (Part 2, "TPM_RC": RC_WARN). */
  readonly warning: boolean;
  /** Nothing was executed and no counter moved: sending the same bytes again is right. */
  readonly retryable: boolean;
}

/** Response codes in their canonical form (Part 2, "TPM_RC"). */
export const Rc = {
  SUCCESS: 0x000,
  INITIALIZE: 0x100,
  FAILURE: 0x101,
  SEQUENCE: 0x103,
  DISABLED: 0x120,
  EXCLUSIVE: 0x121,
  AUTH_TYPE: 0x124,
  AUTH_MISSING: 0x125,
  POLICY: 0x126,
  PCR: 0x127,
  PCR_CHANGED: 0x128,
  UPGRADE: 0x12d,
  TOO_MANY_CONTEXTS: 0x12e,
  AUTH_UNAVAILABLE: 0x12f,
  REBOOT: 0x130,
  UNBALANCED: 0x131,
  COMMAND_SIZE: 0x142,
  COMMAND_CODE: 0x143,
  AUTHSIZE: 0x144,
  AUTH_CONTEXT: 0x145,
  NV_RANGE: 0x146,
  NV_SIZE: 0x147,
  NV_LOCKED: 0x148,
  NV_AUTHORIZATION: 0x149,
  NV_UNINITIALIZED: 0x14a,
  NV_SPACE: 0x14b,
  NV_DEFINED: 0x14c,
  BAD_CONTEXT: 0x150,
  CPHASH: 0x151,
  PARENT: 0x152,
  NEEDS_TEST: 0x153,
  NO_RESULT: 0x154,
  SENSITIVE: 0x155,
  ASYMMETRIC: 0x081,
  ATTRIBUTES: 0x082,
  HASH: 0x083,
  VALUE: 0x084,
  HIERARCHY: 0x085,
  KEY_SIZE: 0x087,
  MGF: 0x088,
  MODE: 0x089,
  TYPE: 0x08a,
  HANDLE: 0x08b,
  KDF: 0x08c,
  RANGE: 0x08d,
  AUTH_FAIL: 0x08e,
  NONCE: 0x08f,
  PP: 0x090,
  SCHEME: 0x092,
  SIZE: 0x095,
  SYMMETRIC: 0x096,
  TAG: 0x097,
  SELECTOR: 0x098,
  INSUFFICIENT: 0x09a,
  SIGNATURE: 0x09b,
  KEY: 0x09c,
  POLICY_FAIL: 0x09d,
  INTEGRITY: 0x09f,
  TICKET: 0x0a0,
  RESERVED_BITS: 0x0a1,
  BAD_AUTH: 0x0a2,
  EXPIRED: 0x0a3,
  POLICY_CC: 0x0a4,
  BINDING: 0x0a5,
  CURVE: 0x0a6,
  ECC_POINT: 0x0a7,
  CONTEXT_GAP: 0x901,
  OBJECT_MEMORY: 0x902,
  SESSION_MEMORY: 0x903,
  MEMORY: 0x904,
  SESSION_HANDLES: 0x905,
  OBJECT_HANDLES: 0x906,
  LOCALITY: 0x907,
  YIELDED: 0x908,
  CANCELED: 0x909,
  TESTING: 0x90a,
  REFERENCE_H0: 0x910,
  REFERENCE_H1: 0x911,
  REFERENCE_H2: 0x912,
  REFERENCE_H3: 0x913,
  REFERENCE_H4: 0x914,
  REFERENCE_H5: 0x915,
  REFERENCE_H6: 0x916,
  REFERENCE_S0: 0x918,
  REFERENCE_S1: 0x919,
  REFERENCE_S2: 0x91a,
  REFERENCE_S3: 0x91b,
  REFERENCE_S4: 0x91c,
  REFERENCE_S5: 0x91d,
  REFERENCE_S6: 0x91e,
  NV_RATE: 0x920,
  LOCKOUT: 0x921,
  RETRY: 0x922,
  NV_UNAVAILABLE: 0x923,
} as const;

/** As the specification describes them, the longest ones shortened. */
const TEXT: Readonly<Record<keyof typeof Rc, string>> = {
  SUCCESS: 'success',
  INITIALIZE: 'TPM not initialized by TPM2_Startup or already initialized',
  FAILURE: 'commands not being accepted because of a TPM failure',
  SEQUENCE: 'improper use of a sequence handle',
  DISABLED: 'the command is disabled',
  EXCLUSIVE: 'command failed because audit sequence required exclusivity',
  AUTH_TYPE: 'authorization handle is not correct for command',
  AUTH_MISSING: 'command requires an authorization session for handle and it is not present',
  POLICY: 'policy failure in math operation or an invalid authPolicy value',
  PCR: 'PCR check fail',
  PCR_CHANGED: 'PCR have changed since checked',
  UPGRADE: 'the TPM is in field upgrade mode, or for TPM2_FieldUpgradeData is not',
  TOO_MANY_CONTEXTS: 'context ID counter is at maximum',
  AUTH_UNAVAILABLE: 'authValue or authPolicy is not available for selected entity',
  REBOOT: 'a _TPM_Init and Startup(CLEAR) is required before the TPM can resume operation',
  UNBALANCED: 'the protection algorithms (hash and symmetric) are not reasonably balanced',
  COMMAND_SIZE: 'commandSize is inconsistent with the contents of the command buffer',
  COMMAND_CODE: 'command code not supported',
  AUTHSIZE: 'authorizationSize is out of range, or there is more in the authorization area than is required',
  AUTH_CONTEXT: 'a session with a context command or another command that cannot have one',
  NV_RANGE: 'NV offset + size is out of range',
  NV_SIZE: 'requested allocation size is larger than allowed',
  NV_LOCKED: 'NV access locked',
  NV_AUTHORIZATION: 'NV access authorization fails in command actions',
  NV_UNINITIALIZED:
    'an NV index is used before being initialized, or the state saved by Shutdown(STATE) could not be restored',
  NV_SPACE: 'insufficient space for NV allocation',
  NV_DEFINED: 'NV Index or persistent object already defined',
  BAD_CONTEXT: 'context in TPM2_ContextLoad is not valid',
  CPHASH: 'cpHash value already set or not correct for use',
  PARENT: 'handle for parent is not a valid parent',
  NEEDS_TEST: 'some function needs testing',
  NO_RESULT:
    'an internal function cannot process the request: usually a parameter that was not filtered before',
  SENSITIVE: 'the sensitive area did not unmarshal correctly after decryption',
  ASYMMETRIC: 'asymmetric algorithm not supported or not correct',
  ATTRIBUTES: 'inconsistent attributes',
  HASH: 'hash algorithm not supported or not appropriate',
  VALUE: 'value is out of range or is not correct for the context',
  HIERARCHY: 'hierarchy is not enabled or is not correct for the use',
  KEY_SIZE: 'key size is not supported',
  MGF: 'mask generation function not supported',
  MODE: 'mode of operation not supported',
  TYPE: 'the type of the value is not appropriate for the use',
  HANDLE: 'the handle is not correct for the use',
  KDF: 'unsupported key derivation function or function not appropriate for use',
  RANGE: 'value was out of allowed range',
  AUTH_FAIL: 'the authorization HMAC check failed and the DA counter incremented',
  NONCE: 'invalid nonce size or nonce value mismatch',
  PP: 'authorization requires assertion of PP',
  SCHEME: 'unsupported or incompatible scheme',
  SIZE: 'structure is the wrong size',
  SYMMETRIC: 'unsupported symmetric algorithm or key size or not appropriate for instance',
  TAG: 'incorrect structure tag',
  SELECTOR: 'union selector is incorrect',
  INSUFFICIENT:
    'the TPM was unable to unmarshal a value because there were not enough octets in the input buffer',
  SIGNATURE: 'the signature is not valid',
  KEY: 'key fields are not compatible with the selected use',
  POLICY_FAIL: 'a policy check failed',
  INTEGRITY: 'integrity check failed',
  TICKET: 'invalid ticket',
  RESERVED_BITS: 'reserved bits not set to zero as required',
  BAD_AUTH: 'authorization failure without DA implications',
  EXPIRED: 'the policy has expired',
  POLICY_CC:
    'the command is not the one in the policy, or a policy command names one that is not implemented',
  BINDING: 'public and sensitive portions of an object are not cryptographically bound',
  CURVE: 'curve not supported',
  ECC_POINT: 'point is not on the required curve',
  CONTEXT_GAP: 'gap for context ID is too large',
  OBJECT_MEMORY: 'out of memory for object contexts',
  SESSION_MEMORY: 'out of memory for session contexts',
  MEMORY: 'out of shared object/session memory or need space for internal operations',
  SESSION_HANDLES: 'out of session handles',
  OBJECT_HANDLES: 'out of object handles',
  LOCALITY: 'bad locality',
  YIELDED: 'the TPM has suspended operation on the command; progress was made and it may be retried',
  CANCELED: 'the command was canceled',
  TESTING: 'the TPM is performing self-tests',
  REFERENCE_H0: 'the 1st handle references a transient object or session that is not loaded',
  REFERENCE_H1: 'the 2nd handle references a transient object or session that is not loaded',
  REFERENCE_H2: 'the 3rd handle references a transient object or session that is not loaded',
  REFERENCE_H3: 'the 4th handle references a transient object or session that is not loaded',
  REFERENCE_H4: 'the 5th handle references a transient object or session that is not loaded',
  REFERENCE_H5: 'the 6th handle references a transient object or session that is not loaded',
  REFERENCE_H6: 'the 7th handle references a transient object or session that is not loaded',
  REFERENCE_S0: 'the 1st authorization session handle references a session that is not loaded',
  REFERENCE_S1: 'the 2nd authorization session handle references a session that is not loaded',
  REFERENCE_S2: 'the 3rd authorization session handle references a session that is not loaded',
  REFERENCE_S3: 'the 4th authorization session handle references a session that is not loaded',
  REFERENCE_S4: 'the 5th authorization session handle references a session that is not loaded',
  REFERENCE_S5: 'the 6th authorization session handle references a session that is not loaded',
  REFERENCE_S6: 'the 7th authorization session handle references a session that is not loaded',
  NV_RATE: 'the TPM is rate limiting accesses to prevent wearout of NV',
  LOCKOUT:
    'the TPM is in DA lockout mode: authorizations that count wrong guesses are not allowed at this time',
  RETRY: 'the TPM was not able to start the command',
  NV_UNAVAILABLE: 'the command may require writing of NV and NV is not currently accessible',
};

const KNOWN = new Map<number, readonly [name: string, text: string]>(
  (Object.keys(Rc) as (keyof typeof Rc)[]).map((key) => [Rc[key], [`TPM_RC_${key}`, TEXT[key]]]),
);

// LOCKOUT and AUTH_FAIL are not here: sending again moves the dictionary attack counter.
const RETRYABLE: ReadonlySet<number> = new Set([Rc.RETRY, Rc.YIELDED, Rc.TESTING, Rc.NV_RATE]);

/** Splits a response code. Format one (bit 7) names what it is about in the bits above; format zero does not. */
export function parseResponseCode(rc: number): ResponseCode {
  const bits = rc & 0xffff; // Above are layer bits, set by resource managers such as the kernel's.
  const formatOne = (bits & 0x80) !== 0;
  const canonical = formatOne ? 0x80 | (bits & 0x3f) : bits & 0xfff;
  const number = (bits >>> 8) & 0xf;
  const [name = `TPM_RC 0x${rc.toString(16)}`, text = ''] = KNOWN.get(canonical) ?? [];
  const warning = !formatOne && (bits & 0x900) === 0x900;
  const common = { rc, canonical, name, text, warning, retryable: RETRYABLE.has(canonical) };
  if (!formatOne) return { ...common, subject: undefined, index: 0 };
  if ((bits & 0x40) !== 0) return { ...common, subject: 'parameter', index: number };
  return { ...common, subject: (number & 8) === 0 ? 'handle' : 'session', index: number & 7 };
}
