import { join } from 'node:path';
import { type Logger, privateDirectory } from 'vtpm-common';
import { VmImages } from '../vm/vm-images.js';
import { AdminClient } from './admin-client.js';
import { Confinements } from './confinement.js';
import { setPassage } from './door-access.js';
import type { Inheritance, SupervisorProgram } from './handover/inheritance.js';
import { collectSources } from './image-sources.js';
import { openState, takeLocks } from './installation.js';
import { knownVtpms } from './known-vtpms.js';
import { endLeftovers, WorkerLedger } from './leftovers.js';
import { ManagerEvents } from './manager-events.js';
import { Supervisor } from './supervisor.js';
import { createTicketOffice } from './ticket-office.js';
import { WorkerImages } from './worker-images.js';
import { WorkerLauncher } from './worker-launcher.js';
import { WorkerPool } from './worker-pool.js';

export interface SupervisorOptions extends SupervisorProgram {
  readonly log: Logger;
  /** What the program before this one hands over. */
  readonly before?: Inheritance;
}

/**
 * Takes the installation's lock, ends what an earlier supervisor left, then reads the list. What the program before this
 * one hands over is taken over instead.
 * @throws ToolstackError `in-use` | `corrupt` | `newer-format` | `missing-package` | …
 */
export async function openSupervisor(options: SupervisorOptions): Promise<Supervisor> {
  const { paths, settings, log, before } = options;
  privateDirectory(paths.home);
  privateDirectory(paths.run);
  privateDirectory(paths.log);
  privateDirectory(paths.supervisor.directory);
  privateDirectory(paths.supervisor.doors);
  const workers = (before?.state.vtpms ?? []).flatMap(({ served }) => served?.worker ?? []);
  const locks = takeLocks(paths, before);
  const ledgerPath = join(paths.supervisor.directory, 'workers.json');
  const spared = workers.flatMap(({ processes }) => processes);
  const imageDirectories = [paths.supervisor.images, paths.supervisor.vmImages];
  const left = await endLeftovers(ledgerPath, imageDirectories, spared);
  if (left > 0) log.warn({ processes: left }, 'ended what was left of the workers of an earlier supervisor');
  const { list, delegateKey } = openState(paths);
  setPassage(paths, list.all(), settings);
  const images = new WorkerImages({
    sources: () => collectSources(options.manifest),
    directory: paths.supervisor.images,
    log,
    inUse: workers.map(({ imageDigest }) => imageDigest),
  });
  const admin = new AdminClient(paths.manager.adminSocket);
  const events = new ManagerEvents(admin, log);
  const office = createTicketOffice({
    admin,
    managerInstance: () => events.instance,
    delegateKey,
    lifetimeSeconds: settings['ticket-lifetime'],
  });
  const ledger = new WorkerLedger(ledgerPath, log);
  const vmImages = new VmImages({
    built: paths.supervisor.vm,
    directory: paths.supervisor.vmImages,
    accelerator: settings['vm-accelerator'],
    log,
  });
  const confinements = await Confinements.open(
    { images: paths.supervisor.images, config: paths.config, settings, ...(before && { before }) },
    images.current.command,
  );
  logLayers(confinements, log);
  const launcher = new WorkerLauncher({ images, vmImages, confinements, ledger, paths });
  const managerKey = () => office.managerKey().catch(() => undefined);
  const pool = new WorkerPool({ launcher, paths, settings, log, managerKey });
  const context = { list, launcher, pool, confinements, office, admin, paths, settings, log };
  const vtpms = await knownVtpms(context, before);
  return new Supervisor({ context, images, delegateKey, admin, events, locks }, vtpms, before?.state);
}

function logLayers({ waived, missing }: Confinements, log: Logger): void {
  for (const layer of waived) log.warn({ layer }, 'waived: workers run without this layer of the sandbox');
  for (const [layer, reason] of missing) {
    log.error(
      { layer, reason },
      'this machine does not give this layer of the sandbox: no worker starts in it',
    );
  }
}
