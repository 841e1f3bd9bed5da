import { type ChildProcess, spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import type { Logger } from 'vtpm-common';
import { ManagerError } from './error.js';

/** The embedded TPM, a software TPM in its own process. */
export interface SoftTpmProcess {
  /** Stops it in order; resolves when it is gone. */
  stop(): Promise<void>;
}

export interface SoftTpmOptions {
  readonly state: string;
  readonly socket: string;
  /** Makes a new TPM: in init only. */
  readonly create: boolean;
  readonly log: Logger;
}

const READY_MS = 15_000;
const STOP_MS = 5_000;
/** The embedded TPM of a manager that was killed a moment ago needs this long to notice. */
const TAKEOVER_MS = 5_000;
const RETRY_MS = 50;
const STDERR_CHARACTERS = 4_000;
const SETPRIV = '/usr/bin/setpriv';

/** @throws ManagerError `tpm-unreachable` with what the process said */
export async function startSoftTpm(options: SoftTpmOptions): Promise<SoftTpmProcess> {
  const deadline = performance.now() + TAKEOVER_MS;
  for (;;) {
    const child = launch(options);
    const failure = await ready(child);
    if (!failure) return supervise(child, options.log);
    const mayTakeOver = failure.includes('in-use') && performance.now() < deadline;
    if (!mayTakeOver) {
      throw new ManagerError('tpm-unreachable', `the embedded TPM did not start: ${failure}`);
    }
    await delay(RETRY_MS);
  }
}

/**
 * With a clean environment. The kernel sends it SIGTERM when this process ends (setpriv(1), --pdeathsig), so that it
 * stops in order even where this process is killed.
 */
function launch({ state, socket, create }: SoftTpmOptions): ChildProcess {
  const command = [
    process.execPath,
    softTpmProgram(),
    ...['--state', state, '--socket', socket, ...(create ? ['--create'] : [])],
  ];
  const [program = '', ...args] = existsSync(SETPRIV)
    ? [SETPRIV, '--pdeathsig', 'TERM', ...command]
    : command;
  return spawn(program, args, { cwd: '/', env: {}, stdio: ['ignore', 'pipe', 'pipe'] });
}

/** The `vtpm-softtpm` command of the vtpmd package, by its path: no code of it is loaded here. */
function softTpmProgram(): string {
  const manifest = createRequire(import.meta.url).resolve('vtpmd/package.json');
  return join(dirname(manifest), 'bin', 'vtpm-softtpm.js');
}

/** @returns undefined once the process has said `ready`, else why it did not */
function ready(child: ChildProcess): Promise<string | undefined> {
  let stdout = '';
  let stderr = '';
  return new Promise((resolve) => {
    const timer = setTimeout(() => {
      child.kill('SIGKILL');
      resolve(`it was not ready within ${READY_MS} ms`);
    }, READY_MS);
    const settle = (failure: string | undefined): void => {
      clearTimeout(timer);
      resolve(failure);
    };
    // The pipes are read to the end of the process: a full one would stop it.
    child.stdout?.setEncoding('utf8').on('data', (text: string) => {
      stdout = (stdout + text).slice(-STDERR_CHARACTERS);
      if (stdout.split('\n').some((line) => line.includes('ready'))) settle(undefined);
    });
    child.stderr?.setEncoding('utf8').on('data', (text: string) => {
      stderr = (stderr + text).slice(-STDERR_CHARACTERS);
    });
    child.once('error', (error) => settle(error.message));
    child.once('close', (code, signal) => settle(`it ended with ${signal ?? code}: ${stderr.trim()}`));
  });
}

function supervise(child: ChildProcess, log: Logger): SoftTpmProcess {
  let isStopping = false;
  const exited = new Promise<void>((resolve) => {
    child.once('exit', (code, signal) => {
      if (!isStopping) {
        log.error(
          { code, signal },
          'the embedded TPM ended; what is unlocked stays so, the next start of the manager needs it again',
        );
      }
      resolve();
    });
  });
  return {
    stop: async () => {
      isStopping = true;
      if (child.exitCode !== null || child.signalCode !== null) return;
      child.kill('SIGTERM');
      const timer = setTimeout(() => child.kill('SIGKILL'), STOP_MS);
      await exited;
      clearTimeout(timer);
    },
  };
}
