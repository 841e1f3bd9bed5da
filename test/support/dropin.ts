import { type ChildProcess, type StdioOptions, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { cleanEnvironment, type Finished, REPOSITORY, run } from './installation.js';
import { reapAtExit } from './reap.js';
import { until } from './until.js';

/** Where the commands named swtpm, swtpm_setup and swtpm_ioctl are, which stand in for swtpm's. */
export const DROPIN = join(REPOSITORY, 'toolstack/bin/dropin');

/** A drop-in command that is to end by itself. @param runDirectory of the installation */
export function dropin(command: string, runDirectory: string, ...args: string[]): Promise<Finished> {
  return run(process.execPath, [join(DROPIN, command), ...args], { VTPM_RUN_DIR: runDirectory });
}

/** A running `swtpm socket`. */
export class SwtpmDropin {
  readonly child: ChildProcess;
  stderr = '';

  /** @param descriptors that are passed on, from number 3 on */
  constructor(runDirectory: string, args: readonly string[], descriptors: readonly number[] = []) {
    const stdio: StdioOptions = ['ignore', 'ignore', 'pipe', ...descriptors];
    this.child = reapAtExit(
      spawn(process.execPath, [join(DROPIN, 'swtpm'), 'socket', '--tpm2', ...args], {
        stdio,
        env: cleanEnvironment({ VTPM_RUN_DIR: runDirectory }),
      }),
    );
    this.child.stderr?.setEncoding('utf8').on('data', (text: string) => {
      this.stderr += text;
    });
  }

  /** Resolves when a file that it makes is there. @throws Error with what it said where it ends instead */
  async made(path: string): Promise<this> {
    await until(path, () => {
      if (this.hasEnded) throw new Error(this.stderr);
      return existsSync(path);
    });
    return this;
  }

  get hasEnded(): boolean {
    return this.child.exitCode !== null || this.child.signalCode !== null;
  }

  /** @returns exit status, null where a signal ended it */
  async end(signal?: NodeJS.Signals): Promise<number | null> {
    if (signal) this.child.kill(signal);
    if (!this.hasEnded) await once(this.child, 'close');
    return this.child.exitCode;
  }
}
