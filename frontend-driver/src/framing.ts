import { FrontendError } from './error.js';

/** Tag (2 bytes), size (4), command or response code (4): TPM 2.0 Library part 1, section 18 "Command/Response Structure". */
export const HEADER_BYTES = 10;
/** The largest command or answer of a TPM of this project (MAX_COMMAND_SIZE and MAX_RESPONSE_SIZE of libtpms). */
export const MAX_MESSAGE_BYTES = 4096;

/** The size field of a header, in bytes, the header included. @throws FrontendError `protocol` outside 10 to 4096 */
export function messageSize(header: Buffer): number {
  const size = header.readUInt32BE(2);
  if (size < HEADER_BYTES || size > MAX_MESSAGE_BYTES) {
    throw new FrontendError(
      'protocol',
      `a TPM message announces ${size} bytes; ${HEADER_BYTES} to ${MAX_MESSAGE_BYTES} are possible`,
    );
  }
  return size;
}

/** Cuts a byte stream into TPM messages by their size field; commands and answers are framed alike. */
export class MessageAssembler {
  #pending: Buffer = Buffer.alloc(0);

  /** Bytes of a message that has begun and is not whole yet. */
  get pendingBytes(): number {
    return this.#pending.length;
  }

  /**
   * The messages that `chunk` completes, each a copy of its own.
   * @throws FrontendError `protocol`: the stream cannot be followed any further
   */
  push(chunk: Uint8Array): Buffer[] {
    const bytes = this.#pending.length === 0 ? asBuffer(chunk) : Buffer.concat([this.#pending, chunk]);
    const messages: Buffer[] = [];
    let offset = 0;
    while (bytes.length - offset >= HEADER_BYTES) {
      const size = messageSize(bytes.subarray(offset));
      if (bytes.length - offset < size) break;
      messages.push(Buffer.from(bytes.subarray(offset, offset + size)));
      offset += size;
    }
    this.#pending = Buffer.from(bytes.subarray(offset));
    return messages;
  }
}

/** A view of the same bytes. */
export function asBuffer(bytes: Uint8Array): Buffer {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}
