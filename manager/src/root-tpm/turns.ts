/**
 * Who uses the TPM when: one at a time, in the order in which they come. Who is urgent goes before all that wait, so that a
 * vTPM that is frozen waits for one statement of a slow chip and not for those of every other migration.
 */
export class Turns {
  readonly #urgent: (() => Promise<void>)[] = [];
  readonly #waiting: (() => Promise<void>)[] = [];
  #running: Promise<void> | undefined;

  take<T>(body: () => Promise<T>, isUrgent = false): Promise<T> {
    return new Promise((resolve, reject) => {
      (isUrgent ? this.#urgent : this.#waiting).push(() => body().then(resolve, reject));
      this.#running ??= this.#run();
    });
  }

  /** Resolves when nobody uses it, and nobody waits. */
  async idle(): Promise<void> {
    await this.#running;
  }

  async #run(): Promise<void> {
    // Not in the call that asked: it goes on first, as with any other promise.
    await Promise.resolve();
    for (let next = this.#next(); next; next = this.#next()) await next();
    this.#running = undefined;
  }

  #next(): (() => Promise<void>) | undefined {
    return this.#urgent.shift() ?? this.#waiting.shift();
  }
}
