/**
 * Bounds the bytes of the saves that are worked on at once. Each is decrypted, sealed, encoded and sent to the store, so
 * it takes several times its size; where the store is slow they would add up. Who finds it full waits for his turn, in the
 * order of arrival, and a stream has one save at a time: none can take another's place.
 */
export class WorkGate {
  #inside = 0;
  readonly #waiting: { readonly bytes: number; enter(): void }[] = [];

  constructor(private readonly limit: number) {}

  /** Bytes inside now. */
  get bytes(): number {
    return this.#inside;
  }

  /** A single save that is larger than the limit enters alone. @returns what to call at the end, once */
  async enter(bytes: number): Promise<() => void> {
    if (this.#waiting.length > 0 || !this.#hasRoom(bytes)) {
      await new Promise<void>((resolve) => this.#waiting.push({ bytes, enter: resolve }));
    } else {
      this.#inside += bytes;
    }
    return () => this.#leave(bytes);
  }

  #leave(bytes: number): void {
    this.#inside -= bytes;
    for (let next = this.#waiting[0]; next && this.#hasRoom(next.bytes); next = this.#waiting[0]) {
      this.#waiting.shift();
      this.#inside += next.bytes;
      next.enter();
    }
  }

  #hasRoom(bytes: number): boolean {
    return this.#inside === 0 || this.#inside + bytes <= this.limit;
  }
}
