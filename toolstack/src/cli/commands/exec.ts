import { type ChildProcess, spawn } from 'node:child_process';
import { ToolstackError } from '../../error.js';
import type { Context } from '../context.js';
import { checkHere } from '../whereabouts.js';

const FORWARDED = ['SIGHUP', 'SIGINT', 'SIGQUIT', 'SIGTERM', 'SIGUSR1', 'SIGUSR2'] as const;
/** A terminal sends these to the program as well, and programs treat the second one differently. */
const FROM_TERMINAL: ReadonlySet<string> = new Set(['SIGINT', 'SIGQUIT']);

/**
 * Runs a program whose TPM is the vTPM: tpm2-tss and tpm2-tools read these variables.
 * @returns the program's exit status; a program ended by a signal ends vtpmctl by the same one
 */
export async function exec(
  nameOrId: string,
  command: readonly string[],
  { supervisor }: Context,
): Promise<number> {
  const [program, ...args] = command[0] === '--' ? command.slice(1) : command;
  if (program === undefined) {
    throw new ToolstackError(
      'usage',
      `no program to run; for example: vtpmctl exec ${nameOrId} -- tpm2_getrandom --hex 8`,
    );
  }
  const vtpm = await supervisor.vtpm(nameOrId);
  checkHere(vtpm);
  if (vtpm.state !== 'running') {
    throw new ToolstackError(
      'not-running',
      vtpm.state === 'crashed' || vtpm.state === 'lost'
        ? `${vtpm.name} has ${vtpm.state === 'lost' ? 'lost its state' : 'crashed'}; power its VM off, then: vtpmctl start ${vtpm.name}`
        : `${vtpm.name} is ${vtpm.state}; start it: vtpmctl start ${vtpm.name}`,
    );
  }
  if (vtpm.sockets.tcti === null) {
    throw new ToolstackError(
      'bad-request',
      `${vtpm.name} has no door "tcti", which programs use; stop it, then: vtpmctl set ${vtpm.name} --doors ${[...(vtpm.doors ?? []), 'tcti'].join(',')}`,
    );
  }
  const tcti = `swtpm:path=${vtpm.sockets.tcti}`;
  let child: ChildProcess | undefined;
  // Before the program exists: it may run before `spawn` has returned, and a signal that comes then is meant for it.
  for (const signal of FORWARDED) {
    process.on(signal, () => {
      if (!(process.stdin.isTTY && FROM_TERMINAL.has(signal))) child?.kill(signal);
    });
  }
  const running = spawn(program, args, {
    stdio: 'inherit',
    env: { ...process.env, TPM2TOOLS_TCTI: tcti, TSS2_TCTI: tcti },
  });
  child = running;
  return await new Promise((resolve, reject) => {
    running.once('error', (cause: NodeJS.ErrnoException) => {
      reject(
        new ToolstackError(
          'bad-request',
          cause.code === 'ENOENT'
            ? `there is no program "${program}"; install it (tpm2_… are in the package tpm2-tools) or give its path`
            : cause.code === 'EACCES'
              ? `"${program}" is not an executable file`
              : `"${program}" cannot be run: ${cause.message}`,
          { cause },
        ),
      );
    });
    running.once('exit', (code, signal) => {
      for (const name of FORWARDED) process.removeAllListeners(name);
      if (signal) process.kill(process.pid, signal);
      resolve(code ?? 1);
    });
  });
}
