/**
 * The 10-byte header of TPM commands and responses: u16 tag, u32 size of the whole, u32 command or response code,
 * all big-endian (TPM 2.0 library, part 1, section 18).
 */
export const HEADER_BYTES = 10;

/** Largest command and response: libtpms's TPM2_MAX_COMMAND_SIZE. */
export const MAX_COMMAND_BYTES = 4096;

export const TAG_NO_SESSIONS = 0x8001;
export const TAG_SESSIONS = 0x8002;

export const TPM_RC_SUCCESS = 0;
export const TPM_RC_BAD_TAG = 0x1e;
export const TPM_RC_INITIALIZE = 0x100;
export const TPM_RC_FAILURE = 0x101;
export const TPM_RC_COMMAND_SIZE = 0x142;
export const TPM_RC_LOCALITY = 0x907;
export const TPM_RC_RETRY = 0x922;
/** Format-one codes, without the bits that say which session or parameter is meant. */
const TPM_RC_AUTH_FAIL = 0x08e;
const TPM_RC_BAD_AUTH = 0x0a2;

/** Command codes that this package acts on (TPM 2.0 library, part 2, section 6.5.2). */
export const TPM_CC = {
  CreatePrimary: 0x131,
  SequenceComplete: 0x13e,
  SetCommandCodeAuditStatus: 0x140,
  IncrementalSelfTest: 0x142,
  SelfTest: 0x143,
  Startup: 0x144,
  Shutdown: 0x145,
  StirRandom: 0x146,
  Create: 0x153,
  Load: 0x157,
  HmacStart: 0x15b,
  ContextLoad: 0x161,
  ContextSave: 0x162,
  FlushContext: 0x165,
  LoadExternal: 0x167,
  NV_ReadPublic: 0x169,
  ReadPublic: 0x173,
  StartAuthSession: 0x176,
  ECC_Parameters: 0x178,
  GetCapability: 0x17a,
  GetRandom: 0x17b,
  GetTestResult: 0x17c,
  PCR_Read: 0x17e,
  EventSequenceComplete: 0x185,
  HashSequenceStart: 0x186,
  TestParms: 0x18a,
  CreateLoaded: 0x191,
} as const;

/**
 * What is wrong with a command's frame, as a response code; `TPM_RC_SUCCESS` where libtpms may see it.
 * `command` has at least HEADER_BYTES.
 */
export function checkFrame(command: Buffer): number {
  const tag = command.readUInt16BE(0);
  if (tag !== TAG_NO_SESSIONS && tag !== TAG_SESSIONS) return TPM_RC_BAD_TAG;
  const size = command.readUInt32BE(2);
  if (size !== command.length || size > MAX_COMMAND_BYTES) return TPM_RC_COMMAND_SIZE;
  return TPM_RC_SUCCESS;
}

/** A response of nothing but a header. */
export function errorResponse(code: number): Buffer {
  const response = Buffer.alloc(HEADER_BYTES);
  response.writeUInt16BE(TAG_NO_SESSIONS, 0);
  response.writeUInt32BE(HEADER_BYTES, 2);
  response.writeUInt32BE(code, 6);
  return response;
}

export function commandCode(command: Buffer): number {
  return command.readUInt32BE(6);
}

export function responseCode(response: Buffer): number {
  return response.readUInt32BE(6);
}

/** True for a code that says that an authorisation value was wrong, whoever's session it was. */
export function isWrongAuthorisation(code: number): boolean {
  // Part 2, section 6.6.2: bit 7 marks format one, bits 6 and 8 to 11 name the session, handle or parameter.
  const kind = code & 0x0bf;
  return code <= 0xfff && (kind === TPM_RC_AUTH_FAIL || kind === TPM_RC_BAD_AUTH);
}

export function hasSessions(command: Buffer): boolean {
  return command.readUInt16BE(0) === TAG_SESSIONS;
}

/** TPM2_StirRandom (part 3, section 16.2) with at most 128 bytes. */
export function stirRandom(bytes: Uint8Array): Buffer {
  const command = Buffer.alloc(HEADER_BYTES + 2 + bytes.length);
  command.writeUInt16BE(TAG_NO_SESSIONS, 0);
  command.writeUInt32BE(command.length, 2);
  command.writeUInt32BE(TPM_CC.StirRandom, 6);
  command.writeUInt16BE(bytes.length, HEADER_BYTES);
  command.set(bytes, HEADER_BYTES + 2);
  return command;
}

/** TPM_CAP_AUDIT_COMMANDS (part 2, section 6.12). */
export const CAP_AUDIT_COMMANDS = 4;

/** TPM2_GetCapability (part 3, section 30.2). */
export function getCapability(capability: number, property: number, count: number): Buffer {
  const command = Buffer.from('8001000000160000017a000000000000000000000000', 'hex');
  command.writeUInt32BE(capability, HEADER_BYTES);
  command.writeUInt32BE(property, HEADER_BYTES + 4);
  command.writeUInt32BE(count, HEADER_BYTES + 8);
  return command;
}

/** TPM2_Startup(CLEAR) (part 3, section 9.3). */
export function startupClear(): Buffer {
  return Buffer.from('80010000000c000001440000', 'hex');
}

/** TPM2_Shutdown(CLEAR) (part 3, section 9.4). */
export function shutdownClear(): Buffer {
  return Buffer.from('80010000000c000001450000', 'hex');
}

/** TPM2_GetRandom of 16 bytes (part 3, section 16.1). */
export function getRandom(): Buffer {
  return Buffer.from('80010000000c0000017b0010', 'hex');
}

/** TPM2_FlushContext (part 3, section 28.4). */
export function flushContext(handle: number): Buffer {
  const command = Buffer.from('80010000000e0000016500000000', 'hex');
  command.writeUInt32BE(handle, HEADER_BYTES);
  return command;
}

/**
 * True for commands that may take tens of milliseconds: key generation and self tests. They run on another thread so
 * that the worker hears its supervisor and manager meanwhile. Elliptic-curve keys take well under a millisecond, but
 * which kind is asked for stands deep in the parameters, and key creation is rare enough not to look.
 */
export function isSlow(code: number): boolean {
  return SLOW.has(code);
}

const SLOW: ReadonlySet<number> = new Set([
  TPM_CC.CreatePrimary,
  TPM_CC.Create,
  TPM_CC.CreateLoaded,
  TPM_CC.SelfTest,
  TPM_CC.IncrementalSelfTest,
]);
