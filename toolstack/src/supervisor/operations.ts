import { ToolstackError } from '../error.js';

/** What is done with one vTPM by request: one thing at a time. */
export class Operations {
  readonly #vtpm: string;
  readonly #sayBusy: (operation: string) => string;
  #current: { readonly name: string; readonly settled: Promise<void> } | undefined;
  #isRemoved = false;
  #holding = new AbortController();

  /**
   * @param vtpm its name
   * @param sayBusy what follows on "vTPM … is " while `operation`, a participle, is under way
   */
  constructor(vtpm: string, sayBusy: (operation: string) => string) {
    this.#vtpm = vtpm;
    this.#sayBusy = sayBusy;
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
      throw new ToolstackError('busy', `vTPM ${this.#vtpm} is ${this.#sayBusy(this.#current.name)}`);
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
