import { HEADER_BYTES, MAX_COMMAND_BYTES } from '../engine/command.js';

/**
 * Cuts a byte stream into TPM commands by their size field. A size that no command can have ends the framing: the
 * header alone comes out, and nothing after it.
 */
export class CommandReader {
  #pending: Buffer = EMPTY;
  #isBroken = false;

  /** True once a size field was below HEADER_BYTES or above MAX_COMMAND_BYTES: what follows cannot be told apart. */
  get isBroken(): boolean {
    return this.#isBroken;
  }

  /** Bytes that no command was made of yet. */
  get pendingBytes(): number {
    return this.#pending.length;
  }

  /** `chunk` is copied. */
  push(chunk: Uint8Array): void {
    if (this.#isBroken) return;
    this.#pending = this.#pending.length === 0 ? Buffer.from(chunk) : Buffer.concat([this.#pending, chunk]);
  }

  /** The next whole command, or the header that broke the framing. The caller may keep it. */
  next(): Buffer | undefined {
    if (this.#pending.length < HEADER_BYTES) return undefined;
    const size = this.#pending.readUInt32BE(2);
    if (size < HEADER_BYTES || size > MAX_COMMAND_BYTES) {
      const header = this.#pending.subarray(0, HEADER_BYTES);
      this.#pending = EMPTY;
      this.#isBroken = true;
      return header;
    }
    if (this.#pending.length < size) return undefined;
    const command = this.#pending.subarray(0, size);
    this.#pending = this.#pending.length === size ? EMPTY : this.#pending.subarray(size);
    return command;
  }
}

const EMPTY = Buffer.alloc(0);
