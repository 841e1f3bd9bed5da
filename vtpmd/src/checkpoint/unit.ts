import { createCipheriv, createDecipheriv, hkdfSync } from 'node:crypto';
import { VtpmdError } from '../error.js';

/** The command or control request whose effect is the last one in a unit, and its answer. */
export interface Answered {
  /** A VMM's control request: its answer goes through the other pipe. */
  readonly isControl: boolean;
  readonly connection: number;
  readonly commandLength: number;
  /** SHA-256, 32 bytes. */
  readonly commandDigest: Buffer;
  readonly response: Buffer;
}

/** What a worker needs to go on from behind one command. */
export interface Unit {
  readonly sequence: number;
  /** Of the unit before it, 0 for none. */
  readonly previous: number;
  /** The permanent state it belongs to: its generation, once it is saved, and its SHA-256. */
  readonly generation: bigint;
  readonly permanentDigest: Buffer;
  /** The command stored that state: where the save was not committed, the unit before this one is the newest. */
  readonly stored: boolean;
  /** Firmware drives the TPM; see OutagePolicy. */
  readonly isFirmware: boolean;
  readonly power: PowerNotes;
  /** Empty where the TPM is off. */
  readonly volatile: Buffer;
  /** A serialised list of who loaded what; see HandleOwners. */
  readonly owners: Buffer;
  /** Absent where the command was the worker's own. */
  readonly answered: Answered | undefined;
}

/** What a worker that goes on needs to know of the TPM's power, and what libtpms does not keep with the state. */
export interface PowerNotes {
  readonly isOff: boolean;
  /** Switched off now, it needs no Shutdown: it was not started, or was shut down and changed nothing since. */
  readonly isOrderly: boolean;
  /** A measurement of a dynamic root of trust is under way: no command may come in between. */
  readonly isMeasuring: boolean;
  /** That the TPM's buffers have; 0 where nobody has chosen one. */
  readonly bufferSize: number;
}

export interface UnitNames {
  /** 16 bytes each. */
  readonly vtpmUuid: Uint8Array;
  readonly vmRunId: Uint8Array;
}

/** Units of format 1 know nothing of power: the TPM is on. */
const FORMAT = 2;
const FORMATS = [2, 1];
const EPOCH_BYTES = 8;
const TAG_BYTES = 16;
/** Fixed part of the plaintext. */
const HEAD_BYTES = 120;
const NO_DIGEST = Buffer.alloc(32);

/**
 * Seals units of one epoch: the epoch in the clear, AES-256-GCM ciphertext, tag. The key is derived for the epoch and the
 * sequence is the nonce: as it rises with each unit, no nonce comes twice. Names, epoch and sequence are associated data.
 */
export class UnitSealer {
  readonly #key: Buffer;
  readonly #epoch: bigint;
  readonly #context: Buffer;
  /** Plaintext of the newest unit; overwritten by the next. */
  #plain = Buffer.alloc(32 * 1024);
  readonly #nonce = Buffer.alloc(12);

  /** @param checkpointKey 32 bytes; the caller wipes it */
  constructor(checkpointKey: Uint8Array, names: UnitNames, epoch: bigint) {
    this.#key = epochKey(checkpointKey, epoch);
    this.#epoch = epoch;
    this.#context = contextOf(FORMAT, names, epoch);
  }

  /** @returns the number of bytes written to `out` @throws VtpmdError `internal` where it does not fit */
  seal(unit: Unit, out: Buffer): number {
    const { volatile, owners, answered } = unit;
    const response = answered?.response ?? EMPTY;
    const length = HEAD_BYTES + volatile.length + owners.length + response.length;
    const total = EPOCH_BYTES + length + TAG_BYTES;
    if (total > out.length) {
      throw new VtpmdError('internal', `a checkpoint of ${total} bytes does not fit into its memory`);
    }
    if (length > this.#plain.length) this.#plain = Buffer.alloc(length);
    const plain = this.#plain;
    plain.writeUInt32LE(FORMAT, 0);
    plain.writeUInt32LE(flagsOf(unit), 4);
    plain.writeBigUInt64LE(BigInt(unit.previous), 8);
    plain.writeBigUInt64LE(unit.generation, 16);
    plain.set(unit.permanentDigest, 24);
    plain.writeUInt32LE(answered?.connection ?? 0, 56);
    plain.writeUInt32LE(answered?.commandLength ?? 0, 60);
    plain.set(answered?.commandDigest ?? NO_DIGEST, 64);
    plain.writeUInt32LE(response.length, 96);
    plain.writeUInt32LE(owners.length, 100);
    plain.writeUInt32LE(volatile.length, 104);
    plain.writeUInt32LE(unit.power.bufferSize, 108);
    plain.set(response, HEAD_BYTES);
    plain.set(owners, HEAD_BYTES + response.length);
    plain.set(volatile, HEAD_BYTES + response.length + owners.length);
    this.#context.writeBigUInt64LE(BigInt(unit.sequence), this.#context.length - 8);
    this.#nonce.writeBigUInt64LE(BigInt(unit.sequence), 0);
    const cipher = createCipheriv('aes-256-gcm', this.#key, this.#nonce).setAAD(this.#context);
    out.writeBigUInt64LE(this.#epoch, 0);
    out.set(cipher.update(plain.subarray(0, length)), EPOCH_BYTES);
    cipher.final();
    out.set(cipher.getAuthTag(), EPOCH_BYTES + length);
    return total;
  }
}

/** @returns undefined where it is not authentic, or of another vTPM, VM run or sequence */
export function openUnit(
  checkpointKey: Uint8Array,
  names: UnitNames,
  sequence: number,
  sealed: Buffer,
): Unit | undefined {
  if (sealed.length < EPOCH_BYTES + HEAD_BYTES + TAG_BYTES) return undefined;
  for (const format of FORMATS) {
    const unit = openFormat(format, checkpointKey, names, sequence, sealed);
    if (unit) return unit;
  }
  return undefined;
}

function openFormat(
  format: number,
  checkpointKey: Uint8Array,
  names: UnitNames,
  sequence: number,
  sealed: Buffer,
): Unit | undefined {
  const epoch = sealed.readBigUInt64LE(0);
  const context = contextOf(format, names, epoch);
  context.writeBigUInt64LE(BigInt(sequence), context.length - 8);
  const nonce = Buffer.alloc(12);
  nonce.writeBigUInt64LE(BigInt(sequence), 0);
  const key = epochKey(checkpointKey, epoch);
  let plain: Buffer;
  try {
    const decipher = createDecipheriv('aes-256-gcm', key, nonce, { authTagLength: TAG_BYTES });
    decipher.setAAD(context).setAuthTag(sealed.subarray(-TAG_BYTES));
    plain = decipher.update(sealed.subarray(EPOCH_BYTES, -TAG_BYTES));
    decipher.final();
  } catch {
    return undefined;
  } finally {
    key.fill(0);
  }
  return parse(plain, sequence, format);
}

function parse(plain: Buffer, sequence: number, format: number): Unit | undefined {
  if (plain.readUInt32LE(0) !== format) return undefined;
  const flags = plain.readUInt32LE(4);
  const owners = HEAD_BYTES + plain.readUInt32LE(96);
  const volatile = owners + plain.readUInt32LE(100);
  if (volatile + plain.readUInt32LE(104) !== plain.length) return undefined;
  return {
    sequence,
    previous: Number(plain.readBigUInt64LE(8)),
    generation: plain.readBigUInt64LE(16),
    permanentDigest: plain.subarray(24, 56),
    stored: (flags & FLAG.stored) !== 0,
    isFirmware: (flags & FLAG.firmware) !== 0,
    power: {
      isOff: (flags & FLAG.off) !== 0,
      isOrderly: (flags & FLAG.orderly) !== 0,
      isMeasuring: (flags & FLAG.measuring) !== 0,
      bufferSize: plain.readUInt32LE(108),
    },
    answered:
      (flags & FLAG.answered) === 0
        ? undefined
        : {
            isControl: (flags & FLAG.control) !== 0,
            connection: plain.readUInt32LE(56),
            commandLength: plain.readUInt32LE(60),
            commandDigest: plain.subarray(64, 96),
            response: plain.subarray(HEAD_BYTES, owners),
          },
    owners: plain.subarray(owners, volatile),
    volatile: plain.subarray(volatile),
  };
}

const FLAG = {
  stored: 1,
  firmware: 2,
  answered: 4,
  off: 8,
  orderly: 16,
  measuring: 32,
  control: 64,
} as const;

function flagsOf({ stored, isFirmware, power, answered }: Unit): number {
  return (
    (stored ? FLAG.stored : 0) |
    (isFirmware ? FLAG.firmware : 0) |
    (answered ? FLAG.answered : 0) |
    (power.isOff ? FLAG.off : 0) |
    (power.isOrderly ? FLAG.orderly : 0) |
    (power.isMeasuring ? FLAG.measuring : 0) |
    (answered?.isControl ? FLAG.control : 0)
  );
}

const EMPTY = Buffer.alloc(0);
const LABEL = Buffer.from('vtpm.v1 checkpoint\0');

/** Everything that names a unit, with room for its sequence at the end. */
function contextOf(format: number, { vtpmUuid, vmRunId }: UnitNames, epoch: bigint): Buffer {
  const context = Buffer.alloc(LABEL.length + 4 + 16 + 16 + 8 + 8);
  context.set(LABEL, 0);
  context.writeUInt32LE(format, LABEL.length);
  context.set(vtpmUuid, LABEL.length + 4);
  context.set(vmRunId, LABEL.length + 20);
  context.writeBigUInt64LE(epoch, LABEL.length + 36);
  return context;
}

function epochKey(checkpointKey: Uint8Array, epoch: bigint): Buffer {
  const salt = Buffer.alloc(8);
  salt.writeBigUInt64LE(epoch);
  return Buffer.from(hkdfSync('sha256', checkpointKey, salt, 'vtpm.v1 checkpoint epoch', 32));
}
