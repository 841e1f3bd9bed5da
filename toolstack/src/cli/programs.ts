import { existsSync, readFileSync, realpathSync, statSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { Paths } from 'vtpm-common';
import { ToolstackError } from '../error.js';

const SETPRIV = '/usr/bin/setpriv';
const toolstack = fileURLToPath(new URL('../..', import.meta.url));

/** The files of the daemons, found the way Node finds packages: no PATH is asked. @throws ToolstackError `missing-package` */
export function managerProgram(): string {
  let description: string;
  try {
    description = createRequire(import.meta.url).resolve('vtpm-manager/package.json');
  } catch (cause) {
    throw new ToolstackError(
      'missing-package',
      'the package vtpm-manager is not installed beside vtpmctl; run npm ci in the checkout',
      { cause },
    );
  }
  return built(
    join(dirname(description), 'bin', 'vtpm-managerd.js'),
    join(dirname(description), 'dist/program/vtpm-managerd.js'),
  );
}

/** How a program is run. */
export interface Invocation {
  readonly file: string;
  readonly args: readonly string[];
}

/**
 * vtpm-managerd, for root as the user that the installation's manager directory belongs to, with that user's groups: what it
 * makes must be that one's, and a manager of a service has a user of its own.
 * @throws ToolstackError `missing-package`
 */
export function managerInvocation(paths: Paths, args: readonly string[]): Invocation {
  const command = [process.execPath, managerProgram(), ...args];
  const owner = statSync(paths.manager.directory, { throwIfNoEntry: false });
  const [file = '', ...rest] =
    process.getuid?.() === 0 && owner && owner.uid !== 0
      ? [SETPRIV, `--reuid=${owner.uid}`, `--regid=${owner.gid}`, '--init-groups', '--', ...command]
      : command;
  return { file, args: rest };
}

export function supervisorInvocation(args: readonly string[]): Invocation {
  return { file: process.execPath, args: [supervisorProgram(), ...args] };
}

export function supervisorProgram(): string {
  return built(
    join(toolstack, 'bin', 'vtpm-supervisord.js'),
    join(toolstack, 'dist/program/vtpm-supervisord.js'),
  );
}

/** Whether this is a working tree of the project: its worker image changes with each build. */
export function isCheckout(directory: string = toolstack): boolean {
  const root = join(realpathSync(directory), '..');
  try {
    const { workspaces } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as {
      workspaces?: unknown;
    };
    return Array.isArray(workspaces);
  } catch {
    return false;
  }
}

function built(program: string, code: string): string {
  if (!existsSync(code)) {
    throw new ToolstackError('missing-package', `${code} is missing; build it: npm run build`);
  }
  return program;
}
