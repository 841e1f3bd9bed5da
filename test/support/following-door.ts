import { once } from 'node:events';
import { createConnection } from 'node:net';
import { setTimeout as delay } from 'node:timers/promises';
import type { Transport } from 'tpm2-ts-bindings';
import { TpmClient } from './tpm-client.js';

/** Of a guest whose TPM is nowhere. */
const LIMIT_MS = 60_000;

/** One move, as a guest sees it. */
export interface Gap {
  /** Milliseconds from the last answer here to the first one there. */
  readonly ms: number;
  readonly door: string;
}

/**
 * A guest's way to a TPM that moves: where the connection ends, it goes to whichever of the doors is open and sends there
 * what was not answered. So a command that was run and not answered is run twice, and an `ExactGuest` sees that.
 */
export class FollowingDoor implements Transport {
  readonly gaps: Gap[] = [];
  #client: TpmClient | undefined;
  #door = '';
  #lastAnswer = performance.now();
  #isClosed = false;

  constructor(private readonly doors: readonly string[]) {}

  /** The door of the last answer. */
  get door(): string {
    return this.#door;
  }

  async transmit(command: Uint8Array): Promise<Buffer> {
    const from = this.#door;
    const limit = performance.now() + LIMIT_MS;
    while (!this.#isClosed) {
      this.#client ??= await this.#connect();
      const answer = await this.#client?.transmit(command).catch(() => undefined);
      if (answer) {
        const now = performance.now();
        if (from !== '' && from !== this.#door)
          this.gaps.push({ ms: now - this.#lastAnswer, door: this.#door });
        this.#lastAnswer = now;
        return Buffer.from(answer);
      }
      this.#client?.close();
      this.#client = undefined;
      if (performance.now() > limit) throw new Error(`no door answers: ${this.doors.join(', ')}`);
    }
    throw new Error('closed');
  }

  async close(): Promise<void> {
    this.#isClosed = true;
    this.#client?.close();
  }

  async #connect(): Promise<TpmClient | undefined> {
    for (const door of this.doors) {
      const socket = createConnection(door);
      try {
        await once(socket, 'connect');
        this.#door = door;
        return new TpmClient(socket);
      } catch {
        socket.destroy();
      }
    }
    await delay(1);
    return undefined;
  }
}
