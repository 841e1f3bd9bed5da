import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdtempSync, rmSync, watch } from 'node:fs';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { until } from './until.js';

/** A software TPM of its own process that stands in for a chip. One client at a time on its data socket. */
export interface Swtpm {
  /** Data socket: bare commands and answers. */
  readonly socket: string;
  /** Control socket; tpm2-tools with `swtpm:path=<socket>` want it beside the data socket. */
  readonly control: string;
  readonly directory: string;
  readonly process: ChildProcess;
  /** Ends the process as a power cut does, and waits until it is gone. */
  kill(): Promise<void>;
  /** Starts it again on the same state. */
  restart(): Promise<void>;
  /** Ends the process and removes its directory. */
  stop(): Promise<void>;
}

export async function startSwtpm(
  options: {
    /** `--flags`; without startup-clear the client has to send TPM2_Startup. */ flags?: string;
  } = {},
): Promise<Swtpm> {
  const flags = options.flags ?? 'not-need-init,startup-clear';
  const directory = mkdtempSync(join(tmpdir(), 'vtpm-swtpm-'));
  const socket = join(directory, 'swtpm.sock');
  let child = await launch(directory, socket, flags);
  const kill = async (): Promise<void> => {
    if (child.exitCode !== null || child.signalCode !== null) return;
    const gone = once(child, 'exit');
    child.kill('SIGKILL');
    await gone;
  };
  return {
    socket,
    control: `${socket}.ctrl`,
    directory,
    get process() {
      return child;
    },
    kill,
    async restart() {
      await kill();
      child = await launch(directory, socket, flags);
    },
    async stop() {
      await kill();
      rmSync(directory, { recursive: true, force: true });
    },
  };
}

async function launch(directory: string, socket: string, flags: string): Promise<ChildProcess> {
  rmSync(socket, { force: true });
  rmSync(`${socket}.ctrl`, { force: true });
  const child = spawn(
    'swtpm',
    [
      'socket',
      '--tpm2',
      ...['--tpmstate', `dir=${directory}`],
      ...['--server', `type=unixio,path=${socket}`],
      ...['--ctrl', `type=unixio,path=${socket}.ctrl`],
      ...['--flags', flags],
    ],
    { stdio: ['ignore', 'ignore', 'pipe'] },
  );
  let complaint = '';
  child.stderr?.on('data', (chunk: Buffer) => {
    complaint += chunk.toString();
  });
  const failed = new AbortController();
  child.once('error', (error) => failed.abort(error));
  child.once('exit', (code) => failed.abort(new Error(`swtpm ended with ${code}: ${complaint}`)));
  await exists(`${socket}.ctrl`, directory, failed.signal);
  await exists(socket, directory, failed.signal);
  await until('swtpm listens', () => {
    failed.signal.throwIfAborted();
    return accepts(socket);
  });
  return child;
}

/** A bound socket is there a moment before it listens. swtpm goes on to the next client when this one is gone. */
function accepts(path: string): Promise<boolean> {
  return new Promise((resolve) => {
    const probe = connect(path, () => probe.end());
    probe.on('error', () => resolve(false));
    probe.on('close', (hadError) => resolve(!hadError));
    probe.resume();
  });
}

/** Waits for a file in a directory. */
async function exists(path: string, directory: string, signal: AbortSignal): Promise<void> {
  await new Promise<void>((resolve, reject) => {
    const watcher = watch(directory);
    const settle = (done: () => void): void => {
      watcher.close();
      done();
    };
    const check = (): void => {
      if (existsSync(path)) settle(resolve);
      else if (signal.aborted) settle(() => reject(signal.reason as Error));
    };
    watcher.on('change', check);
    signal.addEventListener('abort', check, { once: true });
    check();
  });
}
