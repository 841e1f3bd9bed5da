import { ToolstackError } from '../error.js';

/** What is done with one vTPM by request: one thing at a time. */
export class Operations {
  readonly #vtpm: string;
  #current: { readonly name: string; readonly settled: Promise<void> } | undefined;
  #isRemoved = false;
  #holding = new AbortController();

  /** @param vtpm its name */
  constructor(vtpm: string) {
    this.#vtpm = vtpm;
  }

  /** What is being done, undefined where nothing is. */
  get current(): string | undefined {
    return this.#current?.name;
  }

  /** When what is being done has been, whatever came of it. */
  get settled(): Promise<void> {
    return this.#current?.settled ?? Promise.resolve();
  }

  get isHeld(): boolean {
    return this.#holding.signal.aborted;
  }

  /** Aborted while it is held; another one after each `release`. */
  get held(): AbortSignal {
    return this.#holding.signal;
  }

  /** Nothing begins until `release`. */
  hold(): void {
    this.#holding.abort();
  }

  release(): void {
    this.#holding = new AbortController();
  }

  /** Nothing begins any more: another vTPM may have its id by now, and with it the right to run the only worker (I-3). */
  removed(): void {
    this.#isRemoved = true;
  }

  /** @param name a participle @throws ToolstackError `busy` | `unknown-vtpm`, and what `run` throws */
  async exclusively(name: string, run: () => Promise<void>): Promise<void> {
    if (this.#current) {
      const { name: other } = this.#current;
      throw new ToolstackError('busy', `vTPM ${this.#vtpm} is being ${other}; try again later`);
    }
    if (this.#isRemoved) throw new ToolstackError('unknown-vtpm', `vTPM ${this.#vtpm} was removed`);
    if (this.isHeld) {
      throw new ToolstackError('busy', 'the supervisor is being upgraded; try again in a moment');
    }
    const running = run();
    this.#current = { name, settled: running.catch(() => undefined) };
    try {
      await running;
    } finally {
      this.#current = undefined;
    }
  }
}
