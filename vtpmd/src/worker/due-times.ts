import type { CommandSource } from './command-source.js';
import type { OutagePolicy } from './outage-policy.js';

/** When each command that waits in an outage may be tried. Where there is no policy none is. */
export class DueTimes {
  readonly #times = new Map<CommandSource, number>();
  #timer: NodeJS.Timeout | undefined;

  /** @param onDue called when the first time has come, after `schedule` or `wait` */
  constructor(
    private readonly policy: OutagePolicy | undefined,
    private readonly onDue: () => void,
  ) {}

  /** It begins to wait. */
  schedule(source: CommandSource): void {
    if (!this.policy) return;
    this.#times.set(source, performance.now() + this.policy.holdTime(source));
    this.wait();
  }

  /** It waits for the end of the outage. */
  never(source: CommandSource): void {
    this.#times.set(source, Number.POSITIVE_INFINITY);
  }

  forget(source: CommandSource): void {
    this.#times.delete(source);
  }

  /** @param now as performance.now() says it */
  isDue(source: CommandSource, now: number): boolean {
    const time = this.#times.get(source);
    return time !== undefined && time <= now;
  }

  wait(): void {
    clearTimeout(this.#timer);
    if (this.#times.size === 0) return;
    const first = Math.min(...this.#times.values());
    if (first === Number.POSITIVE_INFINITY) return;
    this.#timer = setTimeout(this.onDue, Math.max(0, Math.ceil(first - performance.now())));
  }

  end(): void {
    clearTimeout(this.#timer);
  }
}
