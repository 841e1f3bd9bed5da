/** TPM commands as bytes, for tests below the typed client. */

function command(code: number, body: string, tag = 0x8001): Buffer {
  const rest = Buffer.from(body.replaceAll(' ', ''), 'hex');
  const out = Buffer.alloc(10 + rest.length);
  out.writeUInt16BE(tag, 0);
  out.writeUInt32BE(out.length, 2);
  out.writeUInt32BE(code, 6);
  out.set(rest, 10);
  return out;
}

const PASSWORD = '00000009 40000009 0000 00 0000';
const sized = (text: string): string => hex16(text.length) + Buffer.from(text).toString('hex');
const authorisation = (password: string): string =>
  `${hex32(9 + password.length)} 40000009 0000 00 ${sized(password)}`;
const hex32 = (value: number): string => value.toString(16).padStart(8, '0');
const hex16 = (value: number): string => value.toString(16).padStart(4, '0');

export const getRandom = (bytes = 16): Buffer => command(0x17b, hex16(bytes));
export const readClock = (): Buffer => command(0x181, '');
/** A P-256 storage primary in the owner hierarchy. */
export const createPrimaryEcc = (): Buffer =>
  command(
    0x131,
    `40000001 ${PASSWORD} 0004 0000 0000 001a 0023 000b 00030072 0000 0006 0080 0043 0010 0003 0010 0000 0000 0000 00000000`,
    0x8002,
  );
/** An RSA storage primary in the owner hierarchy: slow. @param policy 32 bytes, which make another key, or none */
export const createPrimaryRsa = (bits: 2048 | 3072 = 2048, policy = Buffer.alloc(0)): Buffer =>
  command(
    0x131,
    `40000001 ${PASSWORD} 0004 0000 0000 ${hex16(0x1a + policy.length)} 0001 000b 00030072 ${hex16(policy.length)} ${policy.toString('hex')} 0006 0080 0043 0010 ${hex16(bits)} 00000000 0000 0000 00000000`,
    0x8002,
  );
/** PP_Commands that changes nothing: it wants physical presence. */
export const ppCommands = (): Buffer => command(0x12d, `4000000c ${PASSWORD} 00000000 00000000`, 0x8002);
export const startAuthSession = (): Buffer =>
  command(0x176, `40000007 40000007 0010 ${'11'.repeat(16)} 0000 00 0010 000b`);
export const flushContext = (handle: number): Buffer => command(0x165, hex32(handle));
export const contextSave = (handle: number): Buffer => command(0x162, hex32(handle));
export const contextLoad = (context: Buffer): Buffer => command(0x161, context.toString('hex'));
export const nvDefineCounter = (index: number): Buffer =>
  // TPMA_NV: OWNERWRITE | AUTHWRITE | COUNTER | OWNERREAD | AUTHREAD | NO_DA
  command(0x12a, `40000001 ${PASSWORD} 0000 000e ${hex32(index)} 000b 02060016 0000 0008`, 0x8002);
export const nvIncrement = (index: number): Buffer =>
  command(0x134, `${hex32(index)} ${hex32(index)} ${PASSWORD}`, 0x8002);
export const nvReadCounter = (index: number): Buffer =>
  command(0x14e, `${hex32(index)} ${hex32(index)} ${PASSWORD} 0008 0000`, 0x8002);
/** An index of 8 bytes behind a password that dictionary attack protection guards. */
export const nvDefineSecret = (index: number, password: string): Buffer =>
  // TPMA_NV: AUTHWRITE | AUTHREAD
  command(
    0x12a,
    `40000001 ${PASSWORD} ${sized(password)} 000e ${hex32(index)} 000b 00040004 0000 0008`,
    0x8002,
  );
export const nvReadSecret = (index: number, password: string): Buffer =>
  command(0x14e, `${hex32(index)} ${hex32(index)} ${authorisation(password)} 0008 0000`, 0x8002);
/** Keeps an object under a persistent handle. */
export const evictControl = (object: number, persistent: number): Buffer =>
  command(0x120, `40000001 ${hex32(object)} ${PASSWORD} ${hex32(persistent)}`, 0x8002);
/** SHA-256, no password. */
export const sequenceStart = (): Buffer => command(0x186, '0000 000b');
export const sequenceUpdate = (sequence: number, text: string): Buffer =>
  command(0x15c, `${hex32(sequence)} ${PASSWORD} ${sized(text)}`, 0x8002);
export const sequenceComplete = (sequence: number): Buffer =>
  command(0x13e, `${hex32(sequence)} ${PASSWORD} 0000 40000007`, 0x8002);
/** TPM_CAP_TPM_PROPERTIES, TPM_PT_LOCKOUT_COUNTER. */
export const lockoutCounter = (): Buffer => command(0x17a, '00000006 0000020e 00000001');
export const lockoutCounterOf = (response: Buffer): number => response.readUInt32BE(23);
/** TPM_CAP_HANDLES from `first`: the handles that exist there. */
export const getHandles = (first: number): Buffer => command(0x17a, `00000001 ${hex32(first)} 000000fe`);

/** SHA-256 bank. */
export const pcrRead = (pcr: number): Buffer => {
  const select = Buffer.alloc(3);
  select.writeUInt8(1 << (pcr % 8), pcr >> 3);
  return command(0x17e, `00000001 000b 03 ${select.toString('hex')}`);
};
export const pcrExtend = (pcr: number, digest: Buffer): Buffer =>
  command(0x182, `${hex32(pcr)} ${PASSWORD} 00000001 000b ${digest.toString('hex')}`, 0x8002);

export const pcrReset = (pcr: number): Buffer => command(0x13d, `${hex32(pcr)} ${PASSWORD}`, 0x8002);

export const responseCode = (response: Buffer): number => response.readUInt32BE(6);

/** The value of a counter from the answer to `nvReadCounter`. */
export function counterOf(response: Buffer): bigint {
  // Header, parameter size, size of the data, data.
  return response.readBigUInt64BE(10 + 4 + 2);
}

/** Handles from the answer to `getHandles`. */
export function handlesOf(response: Buffer): number[] {
  const count = response.readUInt32BE(15);
  return Array.from({ length: count }, (_, index) => response.readUInt32BE(19 + 4 * index));
}
