import { existsSync } from 'node:fs';
import { checkSocketPath, environmentName } from 'vtpm-common';
import { ToolstackError } from '../../error.js';
import { holdBackgroundLock, startInBackground } from '../background.js';
import type { Context } from '../context.js';
import type { ManagerHealth } from '../manager-api.js';
import { isCheckout, managerInvocation, supervisorInvocation } from '../programs.js';
import type { SupervisorHealth } from '../supervisor-api.js';

/** A daemon that works answers its health in a moment; one that does not is asked again. */
const HEALTH_TIMEOUT_MS = 2_000;

/** Starts manager and supervisor in the background, those that do not run yet, and waits until they are ready. */
export async function up(context: Context): Promise<void> {
  const { configuration, output } = context;
  const { paths } = configuration;
  if (!existsSync(paths.manager.enrolment)) {
    throw new ToolstackError(
      'not-initialised',
      `${paths.home} is not initialised; run: vtpmctl init --tpm auto (or name another installation with --home)`,
    );
  }
  // Said here and not by a daemon that ends: `init` may have been given another --run-dir.
  try {
    checkSocketPath(paths.manager.toolstackSocket);
  } catch (cause) {
    throw new ToolstackError('usage', (cause as Error).message, { cause });
  }
  holdBackgroundLock(paths);
  const environment = daemonEnvironment(configuration);
  const places = ['--home', paths.home, '--run-dir', paths.run];

  const managerBefore = await managerHealth(context);
  const manager =
    managerBefore ??
    (await startInBackground(
      { daemon: 'manager', invocation: managerInvocation(paths, places), paths },
      environment,
      () => managerHealth(context),
    ));
  if (manager.status === 'locked') {
    throw new ToolstackError(
      'locked',
      `the manager is locked: ${(manager.message ?? 'the platform is not in the state it was enrolled in').replace(/\.$/, '')}. ` +
        'It stays up meanwhile and gives nothing out; afterwards: vtpmctl up',
    );
  }
  if (manager.tpm.hardwareProtected === false && manager.tpm.kind === 'embedded') {
    output.note('warning: the root TPM is the embedded one: nothing is hardware-protected');
  }

  const supervisorBefore = await supervisorHealth(context);
  const supervisor =
    supervisorBefore ??
    (await startInBackground(
      { daemon: 'supervisor', invocation: supervisorInvocation(places), paths },
      environment,
      () => supervisorHealth(context),
    ));
  const allowed = await allowImage(context, supervisor.imageDigest);
  const started = [managerBefore ? [] : ['manager'], supervisorBefore ? [] : ['supervisor']].flat();
  output.result(
    {
      started,
      manager: { status: manager.status, managerId: manager.managerId, tpm: manager.tpm },
      supervisor: { status: supervisor.status, imageDigest: supervisor.imageDigest },
      allowedImage: allowed ? supervisor.imageDigest : null,
    },
    started.length === 0
      ? 'manager and supervisor are running already'
      : `${started.join(' and ')} started; next: vtpmctl create NAME, vtpmctl list`,
  );
}

/** @returns undefined where nobody answers yet, or the manager is still opening its store */
async function managerHealth({ manager }: Context): Promise<ManagerHealth | undefined> {
  const health = await ifRunning(() => manager.health(HEALTH_TIMEOUT_MS));
  return health?.status === 'starting' ? undefined : health;
}

async function supervisorHealth({ supervisor }: Context): Promise<SupervisorHealth | undefined> {
  const health = await ifRunning(() => supervisor.health(HEALTH_TIMEOUT_MS));
  return health?.status === 'ready' ? health : undefined;
}

async function ifRunning<T>(ask: () => Promise<T>): Promise<T | undefined> {
  try {
    return await ask();
  } catch (error) {
    const code = ToolstackError.from(error).code;
    if (code === 'not-running' || code === 'manager-unreachable') return undefined;
    throw error;
  }
}

/**
 * In a checkout each build makes another worker image, so the fresh one is allowed here; elsewhere that is the
 * operator's decision. @returns whether it was allowed now
 */
async function allowImage({ manager, output }: Context, digest: string): Promise<boolean> {
  const isAllowed = (await manager.images()).some((image) => image.digest === digest);
  if (isAllowed) return false;
  if (!isCheckout()) {
    output.note(
      `warning: the worker image ${digest} is not allowed yet, no vTPM can start; if this is the one you installed: vtpmctl image allow`,
    );
    return false;
  }
  await manager.allowImage(digest, 'built in this checkout, allowed by vtpmctl up');
  output.note(`allowed the worker image of this checkout: ${digest}`);
  return true;
}

/** Flags given to vtpmctl reach the daemons as environment, which is next in rank. */
function daemonEnvironment({ settings, sources }: Context['configuration']): NodeJS.ProcessEnv {
  const environment = { ...process.env };
  for (const key of ['log-level', 'log-format'] as const) {
    if (sources[key] === 'flag') environment[environmentName(key)] = settings[key];
  }
  return environment;
}
