import { existsSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { until } from './until.js';

/**
 * Stops a running program at a barrier, again and again over its restarts: there it dies, or waits until it is let go. While
 * it waits it answers nobody.
 */
export class BarrierSwitch {
  readonly #order: string;
  readonly #reached: string;

  /** @param directory of its own */
  constructor(directory: string) {
    this.#order = join(directory, 'order');
    this.#reached = join(directory, 'reached');
  }

  /** For the program's start: `--import` and the prelude. */
  get nodeArgs(): string[] {
    const source = `import { existsSync, readFileSync, writeFileSync } from 'node:fs';
const [order, reached] = ${JSON.stringify([this.#order, this.#reached])};
const clock = new Int32Array(new SharedArrayBuffer(4));
globalThis[Symbol.for('vtpm.barrier')] = (name) => {
  if (!existsSync(order)) return;
  const [at, then] = readFileSync(order, 'utf8').split(' ');
  if (name !== at || existsSync(reached)) return;
  writeFileSync(reached, name);
  if (then === 'die') process.kill(process.pid, 'SIGKILL');
  while (existsSync(order)) Atomics.wait(clock, 0, 0, 2);
};`;
    return ['--import', `data:text/javascript,${encodeURIComponent(source)}`];
  }

  /** At the next time that the program comes to it. */
  stopAt(barrier: string, then: 'die' | 'wait'): void {
    rmSync(this.#reached, { force: true });
    writeFileSync(this.#order, `${barrier} ${then}`);
  }

  get isReached(): boolean {
    return existsSync(this.#reached) && readFileSync(this.#reached, 'utf8') !== '';
  }

  async reached(): Promise<void> {
    await until('the program comes to the barrier', () => this.isReached);
  }

  /** It goes on; later barriers do not stop it. */
  release(): void {
    rmSync(this.#order, { force: true });
  }
}
