import { existsSync } from 'node:fs';
import { type Finding, finding, libtpmsVersion, VERSION } from 'vtpm-common';
import { ToolstackError } from '../../error.js';
import type { Context } from '../context.js';
import type { Migration } from '../manager-api.js';

/** Whether the daemons run, and whether they, the worker image and libtpms fit what is saved. */
export async function checkDaemons({ configuration, manager, supervisor }: Context): Promise<Finding[]> {
  if (!existsSync(configuration.paths.manager.enrolment)) {
    return [
      finding(
        'installation',
        'note',
        `${configuration.paths.home} is not initialised`,
        'vtpmctl init --tpm auto',
      ),
    ];
  }
  const findings: Finding[] = [];
  const managerHealth = await attempt(() => manager.health(5_000));
  const supervisorHealth = await attempt(() => supervisor.health(5_000));
  findings.push(runs('manager', managerHealth), runs('supervisor', supervisorHealth));
  if (!(managerHealth instanceof ToolstackError)) {
    if (managerHealth.status === 'locked') {
      findings.push(
        finding(
          'manager-locked',
          'problem',
          `the manager is locked: ${(managerHealth.message ?? '').replace(/\.$/, '')}`,
          'vtpmctl down, then vtpmctl up, on the platform it was enrolled on',
        ),
      );
    }
    findings.push(fits('manager', managerHealth.version));
  }
  if (!(supervisorHealth instanceof ToolstackError)) {
    findings.push(fits('supervisor', supervisorHealth.version));
    if (!(managerHealth instanceof ToolstackError) && managerHealth.status === 'ready') {
      findings.push(image(await manager.images(), supervisorHealth.imageDigest));
    }
  }
  if (!(managerHealth instanceof ToolstackError) && managerHealth.status === 'ready') {
    findings.push(checkSaved(await manager.vtpms()));
    const migrations = await attempt(() => manager.migrations());
    // One of another version, which is told apart above.
    if (!(migrations instanceof ToolstackError)) findings.push(...checkMigrations(migrations));
  }
  return findings;
}

/** A vTPM of which nobody knows where it lives runs nowhere. */
export function checkMigrations(
  migrations: readonly Pick<Migration, 'id' | 'role' | 'state' | 'peer'>[],
): Finding[] {
  const open = migrations.filter(({ role, state }) => role === 'source' && state === 'in-doubt');
  if (open.length === 0) return [finding('migrations', 'ok', 'no migration is in doubt')];
  return open.map(({ id, peer }) =>
    finding(
      'migrations',
      'problem',
      `whether vTPM ${id} has moved to ${peer} is in doubt, and nobody runs it`,
      `vtpmctl migrate resolve ${id}, when ${peer} can be reached`,
    ),
  );
}

function runs(daemon: 'manager' | 'supervisor', health: object | ToolstackError): Finding {
  if (!(health instanceof ToolstackError)) return finding(`${daemon}-runs`, 'ok', `the ${daemon} runs`);
  return health.code === 'not-running'
    ? finding(`${daemon}-runs`, 'note', `the ${daemon} does not run`, 'vtpmctl up')
    : finding(`${daemon}-runs`, 'problem', health.message, 'vtpmctl logs');
}

function fits(daemon: 'manager' | 'supervisor', version: string): Finding {
  return version === VERSION
    ? finding(`${daemon}-version`, 'ok', `the ${daemon} is of version ${VERSION}, as vtpmctl is`)
    : finding(
        `${daemon}-version`,
        'warning',
        `the ${daemon} that runs is of version ${version}, vtpmctl of ${VERSION}`,
        'vtpmctl down, then vtpmctl up',
      );
}

function image(allowed: readonly { readonly digest: string }[], digest: string): Finding {
  return allowed.some((image) => image.digest === digest)
    ? finding('worker-image', 'ok', 'the worker image is allowed')
    : finding(
        'worker-image',
        'problem',
        `the worker image ${digest} is not allowed: no vTPM can start`,
        'vtpmctl image allow, if it is the one that you installed',
      );
}

/** An older libtpms may not read what a newer one wrote. */
export function checkSaved(
  vtpms: readonly { readonly id: string; readonly kind: string; readonly libtpmsVersion: string }[],
  installed: () => string = libtpmsVersion,
): Finding {
  let version: string;
  try {
    version = installed();
  } catch (error) {
    return finding('libtpms-fit', 'problem', (error as Error).message, 'apt-get install libtpms0');
  }
  const newer = vtpms.filter((vtpm) => vtpm.kind === 'live' && compare(vtpm.libtpmsVersion, version) > 0);
  return newer.length === 0
    ? finding('libtpms-fit', 'ok', `no vTPM was saved by a newer libtpms than ${version}`)
    : finding(
        'libtpms-fit',
        'problem',
        `libtpms ${version} is older than what saved ${newer.map(({ id }) => id).join(', ')}`,
        'apt-get install --only-upgrade libtpms0',
      );
}

function compare(a: string, b: string): number {
  const [left, right] = [a, b].map((version) => version.split('.').map(Number));
  for (let index = 0; index < 3; index++) {
    const difference = (left?.[index] ?? 0) - (right?.[index] ?? 0);
    if (difference !== 0) return difference;
  }
  return 0;
}

async function attempt<T extends object>(ask: () => Promise<T>): Promise<T | ToolstackError> {
  try {
    return await ask();
  } catch (error) {
    return ToolstackError.from(error);
  }
}
