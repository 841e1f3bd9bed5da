import type { AnchoredStore } from './store/index.js';

const KEY = 'erasure';

/**
 * Since when a retired vTPM waits for the rotation that makes its state unreadable on old disks too. It is a record of
 * the store, not of the manager's memory, so that a restart does not forget it.
 */
export class Erasure {
  /** Notes are written one after the other. */
  #last: Promise<unknown> = Promise.resolve();

  private constructor(
    private readonly store: AnchoredStore,
    private version: number,
    private noted: { readonly keyId: number; readonly since: number } | undefined,
  ) {}

  static async open(store: AnchoredStore): Promise<Erasure> {
    const entry = await store.read(KEY);
    if (!entry) return new Erasure(store, 0, undefined);
    return new Erasure(store, entry.version, {
      keyId: entry.value.readUInt32BE(0),
      since: Number(entry.value.readBigUInt64BE(4)),
    });
  }

  /** Unix milliseconds. @param keyId the generation of the root key in force */
  pendingSince(keyId: number): number | undefined {
    return this.noted?.keyId === keyId ? this.noted.since : undefined;
  }

  /** Before a vTPM under that generation is retired. Durable when it resolves. */
  note(keyId: number, now: number): Promise<void> {
    const run = this.#last.then(() => this.#note(keyId, now));
    this.#last = run.catch(() => undefined);
    return run;
  }

  async #note(keyId: number, now: number): Promise<void> {
    if (this.noted?.keyId === keyId) return;
    const value = Buffer.alloc(12);
    value.writeUInt32BE(keyId, 0);
    value.writeBigUInt64BE(BigInt(now), 4);
    this.version = await this.store.write(KEY, this.version, value);
    this.noted = { keyId, since: now };
  }
}
