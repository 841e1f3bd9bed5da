/**
 * - `tpm`: the TPM answered with a response code, see `response`. Such answers carry no HMAC: hints, never evidence.
 * - `transport`: no answer: the device or socket failed, closed or was too slow. It cannot be used any more.
 * - `malformed`: an answer that is not in the format of its command.
 * - `bad-hmac`: the answer is not from the TPM that shares the session's key, or was changed on its way.
 * - `poisoned`: the session saw a failure before; nothing more is authorised with it.
 * - `usage`: the caller asked for what cannot be sent. Nothing was.
 * - `aborted`: the caller's signal came before the TPM executed anything. TPM, sessions and transport are as they were.
 */
export type TpmErrorCode = 'tpm' | 'transport' | 'malformed' | 'bad-hmac' | 'poisoned' | 'usage' | 'aborted';

/** The one error class of this package. */
export class TpmError extends Error {
  override readonly name = 'TpmError';
  /** Only with code `tpm`. */
  readonly response: ResponseCode | undefined;
  constructor(
    readonly code: TpmErrorCode,
    message: string,
    options?: { cause?: unknown; response?: ResponseCode },
  ) {
    super(message, options?.cause === undefined ? undefined : { cause: options.cause });
    this.response = options?.response;
  }

  /** For the response code of a command. */
  static fromResponse(command: string, rc: number): TpmError {
    const response = parseResponseCode(rc);
    const about = response.subject ? ` (${response.subject} ${response.index})` : '';
    return new TpmError('tpm', `TPM2_${command}: ${response.name}${about}`, { response });
  }

  /** True where the TPM answered with one of these codes, whatever handle, parameter or session it is about. */
  static is(error: unknown, ...canonical: readonly number[]): error is TpmError & { response: ResponseCode } {
    return (
      error instanceof TpmError &&
      error.response !== undefined &&
      canonical.includes(error.response.canonical)
    );
  }
}

/** A response code taken apart (Part 2, 6.6). */
export interface ResponseCode {
  /** As received, with the layer bits of a resource manager. */
  readonly rc: number;
  /** Without handle, parameter or session number: compare with `Rc`. */
  readonly canonical: number;
  readonly name: string;
  readonly subject: 'handle' | 'parameter' | 'session' | undefined;
  /** From 1; 0 where the TPM did not say which. */
  readonly index: number;
  /** The same command may succeed later (Part 2, 6.6.3: RC_WARN). */
  readonly warning: boolean;
  /** Nothing was executed and no counter moved: sending the same bytes again is right. */
  readonly retryable: boolean;
}

/** Response codes in their canonical form (Part 2). */
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
  REFERENCE_S0: 0x918,
  REFERENCE_S1: 0x919,
  REFERENCE_S2: 0x91a,
  NV_RATE: 0x920,
  LOCKOUT: 0x921,
  RETRY: 0x922,
  NV_UNAVAILABLE: 0x923,
} as const;

const NAMES = new Map<number, string>(Object.entries(Rc).map(([name, code]) => [code, `TPM_RC_${name}`]));

// LOCKOUT and AUTH_FAIL are not here: sending again moves the dictionary attack counter.
const RETRYABLE: ReadonlySet<number> = new Set([Rc.RETRY, Rc.YIELDED, Rc.TESTING, Rc.NV_RATE]);

/** Splits a response code. Format one (bit 7) names what it is about in the bits above; format zero does not. */
export function parseResponseCode(rc: number): ResponseCode {
  const bits = rc & 0xffff; // Above are layer bits, set by resource managers such as the kernel's.
  const formatOne = (bits & 0x80) !== 0;
  const canonical = formatOne ? 0x80 | (bits & 0x3f) : bits & 0xfff;
  const number = (bits >>> 8) & 0xf;
  const name = NAMES.get(canonical) ?? `TPM_RC 0x${rc.toString(16)}`;
  const warning = !formatOne && (bits & 0x900) === 0x900;
  const common = { rc, canonical, name, warning, retryable: RETRYABLE.has(canonical) };
  if (!formatOne) return { ...common, subject: undefined, index: 0 };
  if ((bits & 0x40) !== 0) return { ...common, subject: 'parameter', index: number };
  return { ...common, subject: (number & 8) === 0 ? 'handle' : 'session', index: number & 7 };
}
