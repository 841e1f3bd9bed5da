import { VtpmdError } from '../error.js';

/**
 * What goes over the one virtio-serial port between a worker in a VM and its relay on the host: frames of a 8-byte
 * header, big-endian, {channel u32, type u8, length u24}, and `length` bytes.
 */
export type FrameType = 'open' | 'data' | 'end' | 'close' | 'credit' | 'exit';

export interface Frame {
  readonly channel: number;
  readonly type: FrameType;
  /** `data`: its bytes. `credit`: how many more may be sent, u32. `exit`: the status, u32. Otherwise empty. */
  readonly payload: Buffer;
}

const TYPES: readonly FrameType[] = ['open', 'data', 'end', 'close', 'credit', 'exit'];
const HEADER_BYTES = 8;
/** Of one frame's payload. */
export const MAX_PAYLOAD_BYTES = 16 * 1024;
const NUMBER_BYTES = 4;

/** @param payload at most MAX_PAYLOAD_BYTES */
export function encodeFrame(channel: number, type: FrameType, payload: Uint8Array = EMPTY): Buffer {
  const frame = Buffer.allocUnsafe(HEADER_BYTES + payload.length);
  frame.writeUInt32BE(channel, 0);
  frame.writeUInt8(TYPES.indexOf(type), 4);
  frame.writeUIntBE(payload.length, 5, 3);
  frame.set(payload, HEADER_BYTES);
  return frame;
}

export function encodeNumber(channel: number, type: 'credit' | 'exit', value: number): Buffer {
  const payload = Buffer.alloc(NUMBER_BYTES);
  payload.writeUInt32BE(value);
  return encodeFrame(channel, type, payload);
}

/** Cuts a byte stream into frames. What is pending is below one frame. */
export class FrameReader {
  #pending: Buffer = EMPTY;

  /** @throws VtpmdError `protocol` for what no peer that keeps to the rules sends */
  push(chunk: Buffer): Frame[] {
    let rest = this.#pending.length === 0 ? chunk : Buffer.concat([this.#pending, chunk]);
    const frames: Frame[] = [];
    while (rest.length >= HEADER_BYTES) {
      const type = TYPES[rest.readUInt8(4)];
      const length = rest.readUIntBE(5, 3);
      if (!type || !isLengthOf(type, length)) throw new VtpmdError('protocol', 'a frame that cannot be');
      if (rest.length < HEADER_BYTES + length) break;
      const payload = rest.subarray(HEADER_BYTES, HEADER_BYTES + length);
      frames.push({ channel: rest.readUInt32BE(0), type, payload });
      rest = rest.subarray(HEADER_BYTES + length);
    }
    this.#pending = rest;
    return frames;
  }
}

function isLengthOf(type: FrameType, length: number): boolean {
  if (type === 'data') return length > 0 && length <= MAX_PAYLOAD_BYTES;
  return length === (type === 'credit' || type === 'exit' ? NUMBER_BYTES : 0);
}

const EMPTY = Buffer.alloc(0);
