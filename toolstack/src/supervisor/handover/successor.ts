import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { fstatSync, readSync } from 'node:fs';
import { replaceProcess } from 'vtpm-common/exec';
import { ToolstackError } from '../../error.js';
import { CHECK_FLAG, HANDOVER_FLAG } from './names.js';

const CHECK_LIMIT_MS = 60_000;
const CHECK_DESCRIPTOR = 3;
/** A vTPM with 64 connections takes some 4 KiB. */
const MAX_STATE_BYTES = 512 * 1024 * 1024;
const MAX_COMPLAINT_BYTES = 16 * 1024;

/** node's arguments that run what is installed at the place of this program now, with the flags of this one. */
function successorArguments(flag: string, fd: number): string[] {
  const [, script = '', ...given] = process.argv;
  const flags = given.filter(
    (argument, index) => argument !== HANDOVER_FLAG && given[index - 1] !== HANDOVER_FLAG,
  );
  return [...process.execArgv, script, ...flags, flag, String(fd)];
}

/**
 * Runs the next program once to see whether it starts, understands `state` and can do without what it cannot hand back.
 * @throws ToolstackError `upgrade-refused` with what it says
 */
export async function checkSuccessor(state: number): Promise<void> {
  const child = spawn(process.execPath, successorArguments(CHECK_FLAG, CHECK_DESCRIPTOR), {
    stdio: ['ignore', 'ignore', 'pipe', state],
    timeout: CHECK_LIMIT_MS,
    killSignal: 'SIGKILL',
  });
  let said = '';
  child.stderr?.setEncoding('utf8').on('data', (chunk: string) => {
    said = (said + chunk).slice(-MAX_COMPLAINT_BYTES);
  });
  const end = await once(child, 'close').then(
    ([status, signal]: unknown[]) =>
      status === 0 ? undefined : `it ended with ${signal ?? `status ${status}`}`,
    (error: Error) => error.message,
  );
  if (end === undefined) return;
  throw new ToolstackError(
    'upgrade-refused',
    `the program that is installed now does not take over (${complaintOf(said) ?? end}); this one goes on as before`,
  );
}

/** Does not return where it works. @throws ToolstackError `upgrade-refused` where the kernel refuses; nothing has changed then */
export function becomeSuccessor(state: number, descriptors: readonly number[]): never {
  try {
    return replaceProcess(process.execPath, successorArguments(HANDOVER_FLAG, state), [
      state,
      ...descriptors,
    ]);
  } catch (cause) {
    throw new ToolstackError(
      'upgrade-refused',
      `the next program cannot be executed (${(cause as Error).message}); this one goes on as before`,
      { cause },
    );
  }
}

/** @returns what the program before wrote @throws ToolstackError `corrupt` */
export function readState(fd: number): Buffer {
  try {
    const { size } = fstatSync(fd);
    if (!fstatSync(fd).isFile() || size > MAX_STATE_BYTES) throw new Error('it is no file of that kind');
    const content = Buffer.alloc(size);
    for (let at = 0; at < size; ) {
      const read = readSync(fd, content, at, size - at, at);
      if (read === 0) throw new Error('it became shorter');
      at += read;
    }
    return content;
  } catch (cause) {
    throw new ToolstackError(
      'corrupt',
      `descriptor ${fd} does not hold a hand-over: ${(cause as Error).message}`,
      {
        cause,
      },
    );
  }
}

/** A refusal is one line with its code; of a bug the line that names the error. */
function complaintOf(said: string): string | undefined {
  const lines = said.split('\n').filter((line) => line.trim() !== '');
  const refusal = lines.findLast((line) => line.startsWith('vtpm-supervisord: '));
  return (
    refusal?.slice('vtpm-supervisord: '.length) ??
    lines.find((line) => /^\w*Error\b/.test(line)) ??
    lines.at(-1)
  );
}
