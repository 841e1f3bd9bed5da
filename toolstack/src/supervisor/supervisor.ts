import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import {
  bootId,
  checkSocketPath,
  type Logger,
  lockFile,
  type Paths,
  privateDirectory,
  type Settings,
  type SpaceShortage,
  shortageText,
  spaceShortage,
} from 'vtpm-common';
import type { SigningKey } from 'vtpm-proto';
import { ToolstackError } from '../error.js';
import { collectVmSources } from '../vm/sources.js';
import { VmImages } from '../vm/vm-images.js';
import { AdminClient } from './admin-client.js';
import { Confinements } from './confinement.js';
import { createDelegateKey, readDelegateKey } from './delegate-key.js';
import { checkAccess, setPassage } from './door-access.js';
import { doorPaths } from './doors.js';
import { newEntry, parseNewEntry } from './entry.js';
import type { WorkerImage } from './image.js';
import { collectSources } from './image-sources.js';
import { endLeftovers, WorkerLedger } from './leftovers.js';
import { ManagerEvents } from './manager-events.js';
import { createTicketOffice } from './ticket-office.js';
import { Vtpm } from './vtpm.js';
import { VtpmList } from './vtpm-list.js';
import type { VtpmContext } from './vtpm-state.js';
import { WorkerImages } from './worker-images.js';
import { WorkerLauncher } from './worker-launcher.js';
import { type PoolView, WorkerPool } from './worker-pool.js';

export interface SupervisorOptions {
  readonly paths: Paths;
  readonly settings: Settings;
  /** Of the worker's build; see image-sources.ts. */
  readonly manifest: string;
  readonly log: Logger;
}

/** Starting costs processor time: more side by side would only share it. Stopping is mostly waiting. */
const PARALLEL_STARTS = 4;
const PARALLEL_STOPS = 32;
const AUTOSTART_RETRY_MS = 500;

/** The parent of every worker of an installation. */
export class Supervisor {
  readonly delegateKey: SigningKey;
  readonly #context: VtpmContext;
  readonly #images: WorkerImages;
  readonly #vtpms = new Map<string, Vtpm>();
  readonly #admin: AdminClient;
  readonly #events: ManagerEvents;
  readonly #closing = new AbortController();
  #autostart: Promise<void> = Promise.resolve();

  /**
   * Takes the installation's lock, ends what an earlier supervisor left, then reads the list.
   * @throws ToolstackError `in-use` | `corrupt` | `newer-format` | `missing-package` | …
   */
  static async open(options: SupervisorOptions): Promise<Supervisor> {
    const { paths, settings, log } = options;
    privateDirectory(paths.home);
    privateDirectory(paths.run);
    privateDirectory(paths.log);
    privateDirectory(paths.supervisor.directory);
    privateDirectory(paths.supervisor.doors);
    takeLock(paths.supervisor.lock);
    // Another installation may have been given the same --run-dir.
    takeLock(`${paths.supervisor.socket}.lock`);
    const ledgerPath = join(paths.supervisor.directory, 'workers.json');
    const left = await endLeftovers(ledgerPath, [paths.supervisor.images, paths.supervisor.vmImages]);
    if (left > 0)
      log.warn({ processes: left }, 'ended what was left of the workers of an earlier supervisor');
    const { list, delegateKey } = openState(paths);
    setPassage(paths, list.all());
    const images = new WorkerImages({
      sources: () => collectSources(options.manifest),
      directory: paths.supervisor.images,
      log,
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
      { images: paths.supervisor.images, config: paths.config, settings },
      images.current.command,
    );
    logLayers(confinements, log);
    const launcher = new WorkerLauncher({ images, vmImages, confinements, ledger, paths });
    const pool = new WorkerPool({ launcher, paths, settings, log });
    const context = { list, pool, confinements, office, paths, settings, log };
    return new Supervisor(context, images, delegateKey, admin, events);
  }

  private constructor(
    context: VtpmContext,
    images: WorkerImages,
    delegateKey: SigningKey,
    admin: AdminClient,
    events: ManagerEvents,
  ) {
    this.#context = context;
    this.#images = images;
    this.delegateKey = delegateKey;
    this.#admin = admin;
    this.#events = events;
    const boot = bootId().toString('hex');
    const autostart: Vtpm[] = [];
    for (const found of context.list.all()) {
      const entry =
        found.runningInBoot === null ? found : this.#afterLoss(found.id, found.runningInBoot === boot);
      const vtpm = new Vtpm(context, entry);
      this.#vtpms.set(entry.id, vtpm);
      if (entry.autostart && entry.crashed === null) autostart.push(vtpm);
    }
    if (autostart.length > 0) this.#autostart = this.#startAll(autostart);
  }

  /** From which workers are started. */
  get image(): WorkerImage {
    return this.#images.current;
  }

  /** Starts workers from what is installed now. @param expected its digest, where only that one will do @throws ToolstackError `image-not-allowed` | … */
  refreshImage(expected?: string): WorkerImage {
    const image = this.#images.refresh(expected);
    this.#context.pool.renew();
    return image;
  }

  get managerConnected(): boolean {
    return this.#events.isConnected;
  }

  get pool(): PoolView {
    return this.#context.pool.view();
  }

  all(): Vtpm[] {
    return [...this.#vtpms.values()];
  }

  /** By id or name. @throws ToolstackError `unknown-vtpm` */
  find(nameOrId: string): Vtpm {
    const vtpm =
      this.#vtpms.get(nameOrId) ?? this.all().find((candidate) => candidate.entry.name === nameOrId);
    if (vtpm) return vtpm;
    throw new ToolstackError(
      'unknown-vtpm',
      `there is no vTPM "${nameOrId.slice(0, 64)}"; vtpmctl list shows all`,
    );
  }

  /** @param body as POST /vtpms has it. @throws ToolstackError `bad-request` | `name-taken` | `store-full` */
  create(body: unknown): Vtpm {
    const given = parseNewEntry(body);
    this.#context.office.checkDelegation(given);
    try {
      checkSocketPath(`${doorPaths(join(this.#context.paths.supervisor.doors, given.name)).tcti}.ctrl`);
    } catch (error) {
      throw new ToolstackError('bad-request', (error as Error).message);
    }
    checkAccess(given, this.#context.paths);
    if (given.isolation === 'vm') collectVmSources(this.#context.paths.supervisor.vm);
    checkRoom(this.#context.paths, this.#context.settings['store-reserve']);
    const entry = newEntry(given);
    this.#context.list.add(entry);
    setPassage(this.#context.paths, this.#context.list.all());
    const vtpm = new Vtpm(this.#context, entry);
    this.#vtpms.set(entry.id, vtpm);
    return vtpm;
  }

  /** Forgets a vTPM; its state at the manager stays. @throws ToolstackError `not-stopped` | `busy` */
  remove(vtpm: Vtpm): Promise<void> {
    return vtpm.remove(() => {
      this.#context.list.remove(vtpm.entry.id);
      this.#vtpms.delete(vtpm.entry.id);
      setPassage(this.#context.paths, this.#context.list.all());
    });
  }

  /** Stops every worker, in order. */
  async close(): Promise<void> {
    this.#closing.abort();
    await this.#events.close();
    const isPoolEmpty = this.#context.pool.close();
    await inParallel(PARALLEL_STOPS, this.all(), async (vtpm) => {
      await vtpm.shutDown().catch((error: unknown) => {
        this.#context.log.error({ vtpm: vtpm.entry.name, reason: String(error) }, 'not stopped in order');
      });
    });
    await this.#autostart;
    await isPoolEmpty;
    this.#context.confinements.close();
  }

  /**
   * The entry of a vTPM whose worker ended with its supervisor or its host. In the same boot the VM may still run, and
   * a TPM with fresh PCRs must not come back under it; after a reboot of the host no VM run is left.
   */
  #afterLoss(id: string, isSameBoot: boolean): ReturnType<VtpmList['update']> {
    return this.#context.list.update(id, {
      runningInBoot: null,
      crashed: isSameBoot ? 'the supervisor ended and its workers with it' : null,
    });
  }

  /** Waits for the manager first: at boot it may come later. */
  async #startAll(vtpms: readonly Vtpm[]): Promise<void> {
    const { signal } = this.#closing;
    while (!signal.aborted) {
      const health = await this.#admin.health().catch(() => undefined);
      if (health?.status === 'ready') break;
      await delay(AUTOSTART_RETRY_MS, undefined, { signal }).catch(() => undefined);
    }
    await inParallel(PARALLEL_STARTS, vtpms, async (vtpm) => {
      if (signal.aborted || vtpm.state !== 'stopped') return;
      // The reason is in the log and in the vTPM's view.
      await vtpm.start().catch(() => undefined);
    });
  }
}

/**
 * The manager would refuse the first start: then the name is refused already. Where the store is on another disk than the
 * list of vTPMs, both must have room.
 */
function checkRoom(paths: Paths, reserveMiB: number): void {
  for (const path of [paths.supervisor.directory, paths.manager.store]) {
    let shortage: SpaceShortage | undefined;
    try {
      shortage = spaceShortage(path, reserveMiB);
    } catch {
      // Another user's manager: it decides alone.
    }
    if (shortage) throw new ToolstackError('store-full', `no new vTPM is made: ${shortageText(shortage)}`);
  }
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

const locks: number[] = [];

function takeLock(path: string): void {
  const lock = lockFile(path);
  if (lock === undefined) {
    throw new ToolstackError('in-use', `another vtpm-supervisord holds ${path}; stop it first`);
  }
  locks.push(lock);
}

/**
 * The list is made before the key: a key without a list means that the list was lost, and that is never taken for a
 * first start (I-9).
 */
function openState(paths: Paths): { list: VtpmList; delegateKey: SigningKey } {
  const { vtpms, delegateKey: keyPath } = paths.supervisor;
  const key = readDelegateKey(keyPath);
  let list = VtpmList.open(vtpms);
  if (!list) {
    if (key)
      throw new ToolstackError(
        'corrupt',
        `${vtpms} is missing although ${keyPath} is there; restore it from a backup`,
      );
    list = VtpmList.create(vtpms);
  }
  if (!key && list.size > 0) {
    throw new ToolstackError(
      'corrupt',
      `${keyPath} is missing and the vTPMs in ${vtpms} are delegated to it; restore it from a backup`,
    );
  }
  return { list, delegateKey: key ?? createDelegateKey(keyPath) };
}

async function inParallel<T>(
  lanes: number,
  items: readonly T[],
  run: (item: T) => Promise<void>,
): Promise<void> {
  const queue = [...items];
  const lane = async (): Promise<void> => {
    for (let item = queue.shift(); item !== undefined; item = queue.shift()) await run(item);
  };
  await Promise.all(Array.from({ length: lanes }, lane));
}
