/**
 * The commands of swtpm's control protocol (swtpm_ioctls(3)), all fields big-endian: a request is a u32 command
 * and a body, a response a u32 result and a body. This table is all that the door knows of them.
 */
export interface CommandShape {
  readonly code: number;
  readonly name: CommandName;
  /** Bytes of the body that must be there. Some clients pad a body: what follows in the same receive is dropped. */
  readonly body: number;
  /** Where in the request the u32 length of a content is that follows the body, in as many receives as it takes. */
  readonly contentLengthAt?: number;
  /** No padding: a body of another length could mean something else. */
  readonly isExact?: boolean;
  /**
   * Bytes of the response, also where the result is not success: QEMU before 9.2 reads as many whatever the result is, and
   * who reads the result first finds the rest dropped with it.
   */
  readonly response: number;
  /** In what state the TPM must be. Otherwise the result is BAD_ORDINAL. */
  readonly needs: 'any' | 'on' | 'off';
  /** Bit of GET_CAPABILITY's answer that announces it. */
  readonly capability?: number;
  /** Whether it has its turn when no command runs, or is answered at once, whatever runs. */
  readonly turn: 'at-rest' | 'at-once';
}

export type CommandName =
  | 'GET_CAPABILITY'
  | 'INIT'
  | 'SHUTDOWN'
  | 'GET_TPMESTABLISHED'
  | 'SET_LOCALITY'
  | 'HASH_START'
  | 'HASH_DATA'
  | 'HASH_END'
  | 'CANCEL_TPM_CMD'
  | 'STORE_VOLATILE'
  | 'RESET_TPMESTABLISHED'
  | 'GET_STATEBLOB'
  | 'SET_STATEBLOB'
  | 'STOP'
  | 'GET_CONFIG'
  | 'SET_DATAFD'
  | 'SET_BUFFERSIZE'
  | 'GET_INFO'
  | 'LOCK_STORAGE';

const rest = 'at-rest';
const once = 'at-once';

// biome-ignore format: a table
export const COMMANDS: readonly CommandShape[] = [
  { code: 0x01, name: 'GET_CAPABILITY',       body: 0,  response: 8,  needs: 'any', turn: once },
  { code: 0x02, name: 'INIT',                 body: 4,  response: 4,  needs: 'any', turn: rest, capability: 0, isExact: true },
  { code: 0x03, name: 'SHUTDOWN',             body: 0,  response: 4,  needs: 'any', turn: rest, capability: 1 },
  { code: 0x04, name: 'GET_TPMESTABLISHED',   body: 0,  response: 8,  needs: 'on',  turn: once, capability: 2 },
  { code: 0x05, name: 'SET_LOCALITY',         body: 1,  response: 4,  needs: 'any', turn: once, capability: 3 },
  { code: 0x06, name: 'HASH_START',           body: 0,  response: 4,  needs: 'on',  turn: rest, capability: 4 },
  { code: 0x07, name: 'HASH_DATA',            body: 4,  response: 4,  needs: 'on',  turn: rest, capability: 4, contentLengthAt: 4 },
  { code: 0x08, name: 'HASH_END',             body: 0,  response: 4,  needs: 'on',  turn: rest, capability: 4 },
  { code: 0x09, name: 'CANCEL_TPM_CMD',       body: 0,  response: 4,  needs: 'on',  turn: once, capability: 5 },
  { code: 0x0a, name: 'STORE_VOLATILE',       body: 0,  response: 4,  needs: 'on',  turn: rest, capability: 6 },
  { code: 0x0b, name: 'RESET_TPMESTABLISHED', body: 1,  response: 4,  needs: 'on',  turn: rest, capability: 7 },
  { code: 0x0c, name: 'GET_STATEBLOB',        body: 12, response: 16, needs: 'on',  turn: rest, capability: 8 },
  { code: 0x0d, name: 'SET_STATEBLOB',        body: 12, response: 4,  needs: 'off', turn: rest, capability: 9, contentLengthAt: 12 },
  { code: 0x0e, name: 'STOP',                 body: 0,  response: 4,  needs: 'any', turn: rest, capability: 10 },
  { code: 0x0f, name: 'GET_CONFIG',           body: 0,  response: 8,  needs: 'any', turn: once, capability: 11 },
  { code: 0x10, name: 'SET_DATAFD',           body: 0,  response: 4,  needs: 'any', turn: once, capability: 12 },
  { code: 0x11, name: 'SET_BUFFERSIZE',       body: 4,  response: 16, needs: 'any', turn: once, capability: 13 },
  { code: 0x12, name: 'GET_INFO',             body: 16, response: 12, needs: 'any', turn: rest, capability: 14 },
  { code: 0x13, name: 'LOCK_STORAGE',         body: 4,  response: 4,  needs: 'any', turn: rest, capability: 16 },
];

/** The data channel takes commands with the TCG's TPM2_SEND_COMMAND header too. */
const SEND_COMMAND_HEADER = 15;

/** GET_CAPABILITY's bits. The first four bytes of the answer stay 0: old clients read both words as one u64. */
export const CAPABILITIES = COMMANDS.reduce(
  (bits, { capability }) => (capability === undefined ? bits : bits | (1 << capability)),
  1 << SEND_COMMAND_HEADER,
);

/** Longest content of a request. */
export const MAX_CONTENT_BYTES = 512 * 1024;

/** The command code alone. */
export const CODE_BYTES = 4;

const BY_CODE = new Map(COMMANDS.map((shape) => [shape.code, shape]));

/** @returns undefined for a command that nobody knows */
export function shapeOf(code: number): CommandShape | undefined {
  return BY_CODE.get(code);
}
