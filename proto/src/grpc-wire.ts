import { ProtoError } from './error.js';

/** Paths of the worker's two calls (gRPC over HTTP/2, PROTOCOL-HTTP2: "Path"). */
export const LOAD_PATH = '/vtpm.v1.VtpmManager/Load';
export const SAVE_PATH = '/vtpm.v1.VtpmManager/Save';

/** Path of the one call between managers. */
export const EXCHANGE_PATH = '/vtpm.v1.MigrationPeer/Exchange';

/** Path of the toolstack's one call. */
export const MIGRATE_PATH = '/vtpm.v1.VtpmMigration/Migrate';

/** Largest message in either direction: libtpms's largest permanent state is 143 KB, its volatile state 11 KB. */
export const MAX_MESSAGE_BYTES = 512 * 1024;

/** One Length-Prefixed-Message, uncompressed: flag byte 0, u32 length (big-endian), message. */
export function frameMessage(message: Uint8Array): Buffer {
  const out = Buffer.allocUnsafe(5 + message.length);
  out.writeUInt8(0, 0);
  out.writeUInt32BE(message.length, 1);
  out.set(message, 5);
  return out;
}

/** Splits a byte stream into messages. */
export class MessageReader {
  #pending: Buffer = Buffer.alloc(0);

  /** @throws ProtoError `malformed` for a compressed or oversized message */
  push(chunk: Uint8Array): Buffer[] {
    this.#pending = this.#pending.length === 0 ? Buffer.from(chunk) : Buffer.concat([this.#pending, chunk]);
    const messages: Buffer[] = [];
    while (this.#pending.length >= 5) {
      if (this.#pending.readUInt8(0) !== 0)
        throw new ProtoError('malformed', 'compressed gRPC messages are not used here');
      const length = this.#pending.readUInt32BE(1);
      if (length > MAX_MESSAGE_BYTES)
        throw new ProtoError('malformed', `a gRPC message of ${length} bytes is over ${MAX_MESSAGE_BYTES}`);
      if (this.#pending.length < 5 + length) break;
      messages.push(this.#pending.subarray(5, 5 + length));
      this.#pending = this.#pending.subarray(5 + length);
    }
    return messages;
  }
}
