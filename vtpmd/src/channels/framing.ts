import {
  HEADER_BYTES,
  MAX_COMMAND_BYTES,
  TAG_NO_SESSIONS,
  TAG_SESSIONS,
  TPM_RC_COMMAND_SIZE,
  TPM_RC_LOCALITY,
} from '../engine/command.js';
import { isLocality, type Locality } from '../engine/engine.js';

/**
 * TPM_SEND_COMMAND of the TCG simulator (TpmTcpProtocol.h), and TPM2_SEND_COMMAND of swtpm: u32 8, u8 locality, u32 length,
 * command. The answer: u32 length, response, u32 0. A bare command begins with 0x80, so each may come in a frame or not.
 */
export const SEND_COMMAND = 8;
const FRAME_BYTES = 9;
/** Largest command in its frame. */
export const MAX_FRAMED_BYTES = FRAME_BYTES + MAX_COMMAND_BYTES;

/** What the localities of a connection's commands may be. */
export interface Localities {
  /** Of a command that does not say it. */
  readonly current: Locality;
  /** Whether a frame may say this one. */
  allows(locality: Locality): boolean;
}

/** What every door has where nothing else is said. */
export const ONLY_ZERO: Localities = { current: 0, allows: (locality) => locality === 0 };

/** One command in a stream. */
export interface Message {
  /** Bytes in the stream; of one that ends the framing, as many as say so. */
  readonly length: number;
  /** At most MAX_COMMAND_BYTES; a view, valid as long as the bytes that it was read from. */
  readonly command: Buffer;
  /** Absent for a bare command. */
  readonly frame: Frame | undefined;
  /** Its length is one that no command can have: what follows cannot be told apart. */
  readonly isBroken: boolean;
}

/** What a command came in; its answer goes into one too: `framed`. */
export class Frame {
  readonly #head: Buffer;
  readonly #isBroken: boolean;

  /** @param head is copied */
  constructor(head: Buffer, isBroken: boolean) {
    this.#head = Buffer.from(head);
    this.#isBroken = isBroken;
  }

  /** As the stream says it: any byte. */
  get locality(): number {
    return this.#head.readUInt8(4);
  }

  /** The whole, as it came. */
  around(command: Buffer): Buffer {
    return this.#isBroken ? this.#head : Buffer.concat([this.#head, command]);
  }

  /** The code of the answer where the command may not run, undefined where it may. */
  refusal(localities: Localities): number | undefined {
    if (this.#isBroken) return TPM_RC_COMMAND_SIZE;
    const { locality } = this;
    return isLocality(locality) && localities.allows(locality) ? undefined : TPM_RC_LOCALITY;
  }
}

/** At which a command runs that may run. */
export function localityOf(frame: Frame | undefined, { current, allows }: Localities): Locality {
  const said = frame?.locality;
  return said !== undefined && isLocality(said) && allows(said) ? said : current;
}

/** A response in its frame. */
export function framed(response: Buffer): Buffer {
  const whole = Buffer.alloc(4 + response.length + 4);
  whole.writeUInt32BE(response.length, 0);
  whole.set(response, 4);
  return whole;
}

/** Whether an answer, of which there are two bytes at least, is in a frame. */
export function isFramedAnswer(answer: Buffer): boolean {
  const tag = answer.readUInt16BE(0);
  return tag !== TAG_NO_SESSIONS && tag !== TAG_SESSIONS;
}

/** In the place of a command that never came. */
const NO_COMMAND = Buffer.alloc(HEADER_BYTES);

/** The command at the beginning of `bytes`; undefined where it is not all there. */
export function readMessage(bytes: Buffer): Message | undefined {
  if (bytes.length < FRAME_BYTES) return undefined;
  if (bytes.readUInt32BE(0) === SEND_COMMAND) return readFramed(bytes);
  if (bytes.length < HEADER_BYTES) return undefined;
  const size = bytes.readUInt32BE(2);
  const isBroken = !canBe(size);
  const length = isBroken ? HEADER_BYTES : size;
  if (bytes.length < length) return undefined;
  return { length, command: bytes.subarray(0, length), frame: undefined, isBroken };
}

function readFramed(bytes: Buffer): Message | undefined {
  const size = bytes.readUInt32BE(5);
  const isBroken = !canBe(size);
  const length = FRAME_BYTES + (isBroken ? 0 : size);
  if (bytes.length < length) return undefined;
  const command = isBroken ? NO_COMMAND : bytes.subarray(FRAME_BYTES, length);
  return { length, command, frame: new Frame(bytes.subarray(0, FRAME_BYTES), isBroken), isBroken };
}

function canBe(size: number): boolean {
  return size >= HEADER_BYTES && size <= MAX_COMMAND_BYTES;
}
