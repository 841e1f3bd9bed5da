import { existsSync } from 'node:fs';
import { ToolstackError } from '../../error.js';
import { holdBackgroundLock, stopInBackground } from '../background.js';
import type { Context } from '../context.js';
import type { Daemon } from '../http.js';

/** Beyond the time that workers have to stop: the store's last commit, a slow machine. */
const MARGIN_MS = 30_000;

/** Stops the supervisor with all its workers, then the manager. */
export async function down({ configuration, output, supervisor, manager }: Context): Promise<void> {
  const { paths, settings } = configuration;
  // Without the directory nothing can run, and asking must not make one.
  if (existsSync(paths.run)) holdBackgroundLock(paths);
  const timeout = settings['worker-stop-timeout'] + MARGIN_MS;
  const stopped: Daemon[] = [];
  for (const [daemon, health] of [
    ['supervisor', () => supervisor.health(2_000)],
    ['manager', () => manager.health(2_000)],
  ] as const) {
    if (await stopInBackground(paths, daemon, timeout)) stopped.push(daemon);
    else await refuseForeign(daemon, health);
  }
  output.result(
    { stopped },
    stopped.length === 0 ? 'nothing was running' : `${stopped.join(' and ')} stopped`,
  );
}

/** One that answers and was not started by `up` belongs to somebody else, a service manager for example. */
async function refuseForeign(daemon: Daemon, health: () => Promise<unknown>): Promise<void> {
  try {
    await health();
  } catch {
    return;
  }
  throw new ToolstackError(
    'in-use',
    `the ${daemon} runs but was not started by vtpmctl up; stop it with what started it, for example systemctl`,
  );
}
