import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { cleanEnvironment, REPOSITORY } from './installation.js';
import { reapAtExit } from './reap.js';
import type { Host } from './two-hosts.js';
import { until } from './until.js';

/** What vtpmctl says in the end. */
export interface Ended {
  /** `migrated`, `not-migrated` or `in-doubt`. */
  readonly result: string;
  readonly message: string;
}

/** `vtpmctl migrate`, while its VM moves: what it comes to can be waited for. */
export class Ordered {
  readonly ended: Promise<Ended>;
  readonly #phases = new Set<string>();
  readonly #child;
  #errors = '';

  constructor({ installation }: Host, to: Host, name: string) {
    const program = join(REPOSITORY, 'toolstack/bin/vtpmctl.js');
    const args = [program, '--home', installation.home, '--json', 'migrate', name, '--to', to.name];
    const child = reapAtExit(
      spawn(process.execPath, args, { env: cleanEnvironment(), stdio: ['ignore', 'pipe', 'pipe'] }),
    );
    this.#child = child;
    let last: Partial<Ended> & { phase?: string } = {};
    createInterface({ input: child.stdout }).on('line', (line) => {
      last = JSON.parse(line) as typeof last;
      if (last.phase) this.#phases.add(last.phase);
    });
    child.stderr.setEncoding('utf8').on('data', (text: string) => {
      this.#errors += text;
    });
    this.ended = once(child, 'close').then(() => ({
      result: last.result ?? 'none',
      message: last.message || this.#errors,
    }));
  }

  /** On standard error. */
  async says(pattern: RegExp): Promise<void> {
    await until(`vtpmctl says ${pattern}`, () => pattern.test(this.#errors));
  }

  /** Ctrl-C. */
  interrupt(): void {
    this.#child.kill('SIGINT');
  }

  /** @throws where it ends before */
  async reached(phase: string): Promise<void> {
    await Promise.race([
      until(`the migration is ${phase}`, () => this.#phases.has(phase)),
      this.ended.then(({ result, message }) =>
        assert.fail(`it ended before ${phase}: ${result}: ${message}`),
      ),
    ]);
  }
}
