import { existsSync, mkdirSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { until } from './until.js';

/**
 * Stops a running program at barriers, again and again over its restarts: there it dies, or waits until it is let go. While it
 * waits it answers nobody. Each order is for one time.
 */
export class BarrierSwitch {
  readonly #orders: string;
  readonly #reached: string;

  /** @param directory of its own */
  constructor(directory: string) {
    this.#orders = join(directory, 'orders');
    this.#reached = join(directory, 'reached');
    for (const path of [this.#orders, this.#reached]) mkdirSync(path, { recursive: true });
  }

  /** For the program's start: `--import` and the prelude. */
  get nodeArgs(): string[] {
    const source = `import { existsSync, readFileSync, writeFileSync } from 'node:fs';
const clock = new Int32Array(new SharedArrayBuffer(4));
globalThis[Symbol.for('vtpm.barrier')] = (name) => {
  const order = ${JSON.stringify(this.#orders)} + '/' + name;
  const reached = ${JSON.stringify(this.#reached)} + '/' + name;
  if (!existsSync(order) || existsSync(reached)) return;
  writeFileSync(reached, '');
  if (readFileSync(order, 'utf8') === 'die') process.kill(process.pid, 'SIGKILL');
  while (existsSync(order)) Atomics.wait(clock, 0, 0, 2);
};`;
    return ['--import', `data:text/javascript,${encodeURIComponent(source)}`];
  }

  /** At the next time that the program comes to it. */
  stopAt(barrier: string, then: 'die' | 'wait'): void {
    rmSync(join(this.#reached, barrier), { force: true });
    writeFileSync(join(this.#orders, barrier), then);
  }

  isReached(barrier: string): boolean {
    return existsSync(join(this.#reached, barrier));
  }

  async reached(barrier: string): Promise<void> {
    await until(`the program comes to ${barrier}`, () => this.isReached(barrier));
  }

  /** It goes on; without a barrier, from wherever it is stopped, and is stopped nowhere any more. */
  release(barrier?: string): void {
    const names = barrier ? [barrier] : readdirSync(this.#orders);
    for (const name of names) rmSync(join(this.#orders, name), { force: true });
  }
}
