import { readFileSync } from 'node:fs';
import { homedir } from 'node:os';
import { join, resolve } from 'node:path';
import { FrontendError } from './error.js';

export interface LocationOptions {
  readonly home?: string;
  readonly runDir?: string;
  /** The raw one unless given. */
  readonly door?: 'tpm' | 'ring';
}

/**
 * A door of a vTPM: a path as it is, a name as `<run>/vtpms/NAME/tpm.sock`. The run directory is found by
 * the rules of the service (flag, environment, `config.json`, default), repeated here so that this package can be
 * used without the rest.
 * @throws FrontendError `usage`
 */
export function doorOf(
  nameOrPath: string,
  options: LocationOptions = {},
  env: NodeJS.ProcessEnv = process.env,
  uid = process.getuid?.() ?? 0,
): string {
  if (nameOrPath.includes('/')) return resolve(nameOrPath);
  if (nameOrPath === '' || nameOrPath === '.' || nameOrPath === '..') {
    throw new FrontendError(
      'usage',
      `"${nameOrPath}" is neither the name of a vTPM nor a path to its socket`,
    );
  }
  return join(runDirectory(options, env, uid), 'vtpms', nameOrPath, `${options.door ?? 'tpm'}.sock`);
}

function runDirectory(options: LocationOptions, env: NodeJS.ProcessEnv, uid: number): string {
  const given = options.runDir ?? (env.VTPM_RUN_DIR || undefined);
  if (given !== undefined) return resolve(given);
  const usual =
    uid === 0
      ? '/var/lib/vtpm-manager'
      : join(env.XDG_STATE_HOME ?? join(homedir(), '.local/state'), 'vtpm-manager');
  const home = resolve(options.home ?? (env.VTPM_HOME || usual));
  const configured = configuredRunDirectory(join(home, 'config.json'));
  if (configured !== undefined) return resolve(configured);
  return uid === 0 && home === usual ? '/run/vtpm-manager' : join(home, 'run');
}

function configuredRunDirectory(path: string): string | undefined {
  let text: string;
  try {
    text = readFileSync(path, 'utf8');
  } catch (cause) {
    // A guest's user may have no right to the service's home; its default applies then.
    const code = (cause as NodeJS.ErrnoException).code;
    if (code === 'ENOENT' || code === 'EACCES') return undefined;
    throw new FrontendError('usage', `${path} cannot be read: ${(cause as Error).message}`, cause);
  }
  try {
    const value = (JSON.parse(text) as Record<string, unknown> | null)?.['run-dir'];
    return typeof value === 'string' ? value : undefined;
  } catch (cause) {
    throw new FrontendError('usage', `${path} is not JSON; correct it or give --run-dir`, cause);
  }
}
