/** Tasks side by side, so many at a time. The first that fails fails the whole. */
export class Parallel {
  readonly #running = new Set<Promise<void>>();
  #failure: { readonly error: unknown } | undefined;

  constructor(private readonly limit: number) {}

  /** Resolves when there is room for another. @throws what an earlier one threw */
  async add(task: Promise<unknown>): Promise<void> {
    const settled = task
      .then(
        () => undefined,
        (error: unknown) => {
          this.#failure ??= { error };
        },
      )
      .finally(() => this.#running.delete(settled));
    this.#running.add(settled);
    if (this.#running.size >= this.limit) await Promise.race(this.#running);
    this.#check();
  }

  /** Resolves when none is running. @throws what one threw */
  async done(): Promise<void> {
    await this.settled();
    this.#check();
  }

  /** Resolves when none is running. */
  async settled(): Promise<void> {
    await Promise.all(this.#running);
  }

  #check(): void {
    if (this.#failure) throw this.#failure.error;
  }
}
