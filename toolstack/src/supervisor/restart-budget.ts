/** A restart costs a worker, a Load and an entry of the audit log; a link costs a connection to the manager. */
const REFILL_MS = 10_000;

/** So many at once, then one each ten seconds. What a worker says of its progress does not count here. */
export class RestartBudget {
  readonly #burst: number;
  /** Below 0 by those that are to wait. */
  #left: number;
  #at = performance.now();

  constructor(burst: number) {
    this.#burst = burst;
    this.#left = burst;
  }

  spend(): void {
    this.#refill();
    this.#left -= 1;
  }

  /** Milliseconds until what was spent is there. */
  get waitMs(): number {
    this.#refill();
    return Math.max(0, -this.#left * REFILL_MS);
  }

  #refill(): void {
    const now = performance.now();
    this.#left = Math.min(this.#burst, this.#left + (now - this.#at) / REFILL_MS);
    this.#at = now;
  }
}
