import { spawn } from 'node:child_process';
import { once } from 'node:events';
import type { Paths } from 'vtpm-common';
import { isToolstackErrorCode, ToolstackError } from '../error.js';
import { nextStep } from './next-step.js';
import { managerInvocation } from './programs.js';

/**
 * Runs a command of vtpm-managerd to its end: only the manager's program speaks to the TPM.
 * @param args its name and flags, without `--json`
 * @returns its result
 * @throws ToolstackError with the manager's reason, `internal` where it prints something else than JSON
 */
export async function runManagerCommand<T>(paths: Paths, args: readonly string[]): Promise<T> {
  const [name = '', ...flags] = args;
  const all = [name, '--home', paths.home, '--run-dir', paths.run, ...flags, '--json'];
  const { file, args: command } = managerInvocation(paths, all);
  const child = spawn(file, command, { stdio: ['ignore', 'pipe', 'pipe'] });
  let stdout = '';
  let stderr = '';
  child.stdout.setEncoding('utf8').on('data', (text: string) => {
    stdout += text;
  });
  child.stderr.setEncoding('utf8').on('data', (text: string) => {
    stderr += text;
  });
  const [code] = (await once(child, 'close')) as [number | null];
  if (code !== 0) throw refusal(name, stderr);
  try {
    return JSON.parse(stdout) as T;
  } catch (cause) {
    throw new ToolstackError('internal', `vtpm-managerd ${name} printed something else than JSON`, { cause });
  }
}

/** The manager ends with `vtpm-managerd: sentence (code)`; its log lines before that are not the reason. A bug has no code, but a stack. */
function refusal(name: string, stderr: string): ToolstackError {
  const lines = stderr.trim().split('\n');
  for (const line of lines) {
    const said = /^vtpm-managerd: (.*?)(?: \(([a-z-]+)\))?$/.exec(line);
    if (!said?.[1]) continue;
    if (!said[2]) return new ToolstackError('internal', `vtpm-managerd ${name} failed: ${said[1]}`);
    if (isToolstackErrorCode(said[2])) return new ToolstackError(said[2], nextStep(said[2], said[1]));
    return new ToolstackError('manager-refused', `${said[1]} (${said[2]})`);
  }
  return new ToolstackError('manager-refused', `vtpm-managerd ${name} failed: ${lines.at(-1)}`);
}
