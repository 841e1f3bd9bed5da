import { type Message, readMessage } from './framing.js';

/**
 * Cuts a byte stream into TPM commands, bare or framed. A length that no command can have ends the framing: what said so
 * comes out, and nothing after it.
 */
export class CommandReader {
  #pending: Buffer = EMPTY;
  #isBroken = false;

  /** True once a length was one that no command can have. */
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

  /** The next whole command, or what broke the framing. The caller may keep it. */
  next(): Message | undefined {
    const message = readMessage(this.#pending);
    if (!message) return undefined;
    this.#isBroken = message.isBroken;
    const { length } = message;
    this.#pending =
      message.isBroken || this.#pending.length === length ? EMPTY : this.#pending.subarray(length);
    return message;
  }
}

const EMPTY = Buffer.alloc(0);
