import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { reapAtExit } from './reap.js';
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
  /** Starts it again on the same state. @param under a program with its arguments that runs it */
  restart(under?: readonly string[]): Promise<void>;
  /** Ends the process and removes its directory. */
  stop(): Promise<void>;
}

export async function startSwtpm(
  options: {
    /** `--flags`; without startup-clear the client has to send TPM2_Startup. */ flags?: string;
    /** Further arguments. */ more?: readonly string[];
  } = {},
): Promise<Swtpm> {
  const { flags = 'not-need-init,startup-clear', more = [] } = options;
  const given = ['--flags', flags, ...more];
  const directory = mkdtempSync(join(tmpdir(), 'vtpm-swtpm-'));
  const socket = join(directory, 'swtpm.sock');
  let child = await launch(directory, socket, given);
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
    async restart(under) {
      await kill();
      child = await launch(directory, socket, given, under);
    },
    async stop() {
      await kill();
      rmSync(directory, { recursive: true, force: true });
    },
  };
}

async function launch(
  directory: string,
  socket: string,
  given: readonly string[],
  under: readonly string[] = [],
): Promise<ChildProcess> {
  rmSync(socket, { force: true });
  rmSync(`${socket}.ctrl`, { force: true });
  const [program = '', ...args] = [...under, 'swtpm'];
  const child = spawn(
    program,
    [
      ...args,
      'socket',
      '--tpm2',
      ...['--tpmstate', `dir=${directory}`],
      ...['--server', `type=unixio,path=${socket}`],
      ...['--ctrl', `type=unixio,path=${socket}.ctrl`],
      ...given,
    ],
    { stdio: ['ignore', 'ignore', 'pipe'] },
  );
  reapAtExit(child);
  let complaint = '';
  child.stderr?.on('data', (chunk: Buffer) => {
    complaint += chunk.toString();
  });
  let failure: Error | undefined;
  child.once('error', (error) => {
    failure = error;
  });
  child.once('exit', (code) => {
    failure ??= new Error(`swtpm ended with ${code}: ${complaint}`);
  });
  await until('swtpm listens', () => {
    if (failure !== undefined) throw failure;
    return isListening(socket) && isListening(`${socket}.ctrl`);
  });
  return child;
}

/**
 * True where a unix socket takes connections. The file is there a moment before that, and a connection to find out would
 * take the place of the one client.
 */
function isListening(path: string): boolean {
  // The fourth field has the flags; 00010000 is __SO_ACCEPTCON.
  return readFileSync('/proc/net/unix', 'utf8')
    .split('\n')
    .some((line) => line.endsWith(` ${path}`) && line.split(' ')[3] === '00010000');
}

/** One that a VMM powers: it has no data socket until SET_DATAFD. Ends with its VMM's SHUTDOWN, or at `stop`. */
export async function startSwtpmForVmm(
  directory: string,
): Promise<Pick<Swtpm, 'control' | 'process'> & { stop(): Promise<void> }> {
  const control = join(directory, 'swtpm.ctrl');
  rmSync(control, { force: true });
  const options = ['--tpmstate', `dir=${directory}`, '--ctrl', `type=unixio,path=${control}`];
  const child = reapAtExit(spawn('swtpm', ['socket', '--tpm2', ...options], { stdio: 'ignore' }));
  const gone = once(child, 'exit');
  await until('swtpm listens', () => isListening(control));
  const stop = async (): Promise<void> => {
    if (child.exitCode === null && child.signalCode === null) child.kill('SIGKILL');
    await gone;
  };
  return { control, process: child, stop };
}
