import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { defaultHome, pathsOf } from 'vtpm-common/paths';

/**
 * The supervisor's socket for drop-in commands. `VTPM_RUN_DIR` and `VTPM_HOME` name an installation as they do for vtpmctl;
 * without them it is the host's own, for whatever user, and where there is none that of this user.
 */
export function dropinSocket(env: NodeJS.ProcessEnv = process.env): string {
  const { VTPM_RUN_DIR: run, VTPM_HOME: home } = env;
  if (run !== undefined && run !== '') return join(run, 'dropin.sock');
  if (home !== undefined && home !== '') return pathsOf(home).supervisor.dropinSocket;
  const [root, own] = [0, process.getuid?.() ?? 0].map(
    (uid) =>
      pathsOf(defaultHome(uid, env), uid === 0 ? '/run/vtpm-manager' : undefined).supervisor.dropinSocket,
  );
  return root !== undefined && (own === undefined || existsSync(root)) ? root : (own ?? '');
}
