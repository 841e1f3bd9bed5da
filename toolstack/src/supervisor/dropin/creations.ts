import { ToolstackError } from '../../error.js';

/** Each one runs vtpmctl. */
const MAX_AT_ONCE = 2;

/** The creations under way, of all sessions, and what is destroyed of them. */
export class Creations {
  #running = 0;
  readonly #waiting: (() => void)[] = [];
  /** Users and places for which one is under way. */
  readonly #reserved = new Set<string>();

  /** Resolves when one more program may begin. @returns to be called when it has ended, or does not begin */
  async turn(): Promise<() => void> {
    if (this.#running < MAX_AT_ONCE) this.#running++;
    else await new Promise<void>((resolve) => this.#waiting.push(resolve));
    return () => {
      const next = this.#waiting.shift();
      if (next) next();
      else this.#running--;
    };
  }

  /** @returns to be called when the place is free again @throws ToolstackError `busy` where another one is under way there */
  reserve(uid: number, place: string): () => void {
    const key = `${uid} ${place}`;
    if (this.#reserved.has(key)) {
      throw new ToolstackError('busy', `a vTPM is being made for ${place} already; wait for that`);
    }
    this.#reserved.add(key);
    return () => this.#reserved.delete(key);
  }
}
