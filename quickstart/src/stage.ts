import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { createInterface } from 'node:readline';
import { type Paths, pathsOf } from 'vtpm-common';

const require = createRequire(import.meta.url);
const programOf = (packageName: string, bin: string) =>
  join(dirname(require.resolve(`${packageName}/package.json`)), 'bin', bin);

/** The programs of the project on a directory of their own, and a software TPM in place of the host's chip. */
export class Stage {
  readonly directory = mkdtempSync(join(tmpdir(), 'vtpm-quickstart-'));
  readonly home = join(this.directory, 'home');
  readonly paths: Paths = pathsOf(this.home);
  readonly chip = join(this.directory, 'chip.sock');
  readonly recoveryKey = join(this.directory, 'recovery.key');
  #chipProcess: ChildProcess | undefined;

  async startChip(): Promise<void> {
    const args = [
      '--state',
      join(this.directory, 'chip'),
      '--socket',
      this.chip,
      '--create',
      '--log-level',
      'warn',
    ];
    const child = spawn(process.execPath, [programOf('vtpmd', 'vtpm-softtpm.js'), ...args], {
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    this.#chipProcess = child;
    const lines = createInterface(child.stdout);
    await Promise.race([
      once(lines, 'line'),
      once(child, 'exit').then(([code]) => {
        throw new Error(`the software TPM ended with ${code}`);
      }),
    ]);
  }

  /** Runs vtpmctl. @throws Error with its own words where it does not end as expected */
  async ctl(args: string[], expected = 0): Promise<{ stdout: string; stderr: string }> {
    const child = spawn(
      process.execPath,
      [programOf('vtpm-toolstack', 'vtpmctl.js'), '--home', this.home, ...args],
      {
        stdio: ['ignore', 'pipe', 'pipe'],
      },
    );
    const output = { stdout: '', stderr: '' };
    for (const name of ['stdout', 'stderr'] as const) {
      child[name].setEncoding('utf8').on('data', (text: string) => {
        output[name] += text;
      });
    }
    const [code] = (await once(child, 'close')) as [number | null];
    if (code !== expected) {
      throw new Error(
        `vtpmctl ${args.join(' ')} ended with ${code}, not ${expected}\n${output.stderr}${output.stdout}`,
      );
    }
    return output;
  }

  async json(args: string[]): Promise<Record<string, unknown>> {
    return JSON.parse((await this.ctl(['--json', ...args])).stdout) as Record<string, unknown>;
  }

  door(name: string): string {
    return join(this.paths.supervisor.doors, name, 'tpm.sock');
  }

  /** Ends what is left and removes everything. */
  async clear(): Promise<void> {
    await this.ctl(['down']).catch(() => undefined);
    const chip = this.#chipProcess;
    if (chip && chip.exitCode === null && chip.signalCode === null) {
      const gone = once(chip, 'exit');
      chip.kill('SIGTERM');
      await gone;
    }
    rmSync(this.directory, { recursive: true, force: true });
  }
}
