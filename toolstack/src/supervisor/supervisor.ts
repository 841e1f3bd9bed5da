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
import type { KeptDescriptors } from './handover/descriptors.js';
import type { Inheritance } from './handover/inheritance.js';
import type { HandOverState } from './handover/state.js';
import type { WorkerImage } from './image.js';
import { collectSources } from './image-sources.js';
import { endLeftovers, WorkerLedger } from './leftovers.js';
import { ManagerEvents } from './manager-events.js';
import { killAndWait } from './processes.js';
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
  /** What the program before this one hands over. */
  readonly before?: Inheritance;
}

/** Starting costs processor time: more side by side would only share it. Stopping is mostly waiting. */
const PARALLEL_STARTS = 4;
const PARALLEL_STOPS = 32;
const AUTOSTART_RETRY_MS = 500;
/** A start whose worker does not come up takes longer; then the upgrade is refused. */
const HOLD_LIMIT_MS = 60_000;

/** The parent of every worker of an installation. */
export class Supervisor {
  readonly delegateKey: SigningKey;
  readonly #context: VtpmContext;
  readonly #images: WorkerImages;
  readonly #vtpms = new Map<string, Vtpm>();
  readonly #admin: AdminClient;
  readonly #events: ManagerEvents;
  readonly #closing = new AbortController();
  /** Those that are still to be started by themselves. */
  readonly #toStart = new Set<Vtpm>();
  readonly #times: number;
  #autostart: Promise<void> = Promise.resolve();
  #isHeld = false;

  /**
   * Takes the installation's lock, ends what an earlier supervisor left, then reads the list. What the program before this
   * one hands over is taken over instead.
   * @throws ToolstackError `in-use` | `corrupt` | `newer-format` | `missing-package` | …
   */
  static async open(options: SupervisorOptions): Promise<Supervisor> {
    const { paths, settings, log } = options;
    privateDirectory(paths.home);
    privateDirectory(paths.run);
    privateDirectory(paths.log);
    privateDirectory(paths.supervisor.directory);
    privateDirectory(paths.supervisor.doors);
    const { before } = options;
    const workers = (before?.state.vtpms ?? []).flatMap(({ served }) => served?.worker ?? []);
    takeLocks(paths, before);
    const ledgerPath = join(paths.supervisor.directory, 'workers.json');
    const spared = workers.flatMap(({ processes }) => processes);
    const imageDirectories = [paths.supervisor.images, paths.supervisor.vmImages];
    const left = await endLeftovers(ledgerPath, imageDirectories, spared);
    if (left > 0)
      log.warn({ processes: left }, 'ended what was left of the workers of an earlier supervisor');
    const { list, delegateKey } = openState(paths);
    setPassage(paths, list.all());
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
    const pool = new WorkerPool({ launcher, paths, settings, log });
    const context = { list, launcher, pool, confinements, office, paths, settings, log };
    const adopted = before ? await adoptAll(context, before) : new Map<string, Vtpm>();
    return new Supervisor(context, images, delegateKey, admin, events, adopted, before?.state);
  }

  private constructor(
    context: VtpmContext,
    images: WorkerImages,
    delegateKey: SigningKey,
    admin: AdminClient,
    events: ManagerEvents,
    adopted: ReadonlyMap<string, Vtpm>,
    before: HandOverState | undefined,
  ) {
    this.#context = context;
    this.#images = images;
    this.delegateKey = delegateKey;
    this.#admin = admin;
    this.#events = events;
    this.#times = before?.times ?? 0;
    const boot = bootId().toString('hex');
    for (const found of context.list.all()) {
      const taken = adopted.get(found.id);
      const isLost = !taken && found.runningInBoot !== null;
      const entry = isLost ? this.#afterLoss(found.id, found.runningInBoot === boot) : found;
      const vtpm = taken ?? new Vtpm(context, entry);
      this.#vtpms.set(entry.id, vtpm);
      const isToStart = before
        ? before.autostart.includes(entry.id)
        : entry.autostart && entry.crashed === null;
      if (isToStart) this.#toStart.add(vtpm);
    }
    this.#autostart = this.#startAll();
  }

  /** How often this process has become another program. */
  get upgrades(): number {
    return this.#times;
  }

  /**
   * No operation begins until `release`. Resolves when those under way have settled, whatever came of them.
   * @throws ToolstackError `busy` where one of them does not settle
   */
  async hold(): Promise<void> {
    this.#checkOpen();
    this.#isHeld = true;
    const isQuiet = Promise.all(this.all().map((vtpm) => vtpm.hold())).then(() => true);
    const timeout = new AbortController();
    const isLate = delay(HOLD_LIMIT_MS, false, { signal: timeout.signal }).catch(() => false);
    const isHeld = await Promise.race([isQuiet, isLate]);
    timeout.abort();
    if (isHeld) return;
    const busy = this.all().filter(({ operation }) => operation !== undefined);
    throw new ToolstackError(
      'busy',
      `${busy.map(({ entry, operation }) => `vTPM ${entry.name} is being ${operation}`).join(', ')}; try again later`,
    );
  }

  /** Ends what is not handed over. Only while held. */
  async rest(): Promise<void> {
    await this.#context.pool.close();
  }

  release(): void {
    this.#isHeld = false;
    if (this.#closing.signal.aborted) return;
    this.#context.pool.open();
    for (const vtpm of this.all()) vtpm.release();
    this.#autostart = this.#autostart.then(() => this.#startAll());
  }

  #checkOpen(): void {
    if (this.#closing.signal.aborted) {
      throw new ToolstackError('busy', 'the supervisor is stopping; start it again');
    }
  }

  /** What the next program needs to know. Only while held. @throws ToolstackError `busy` */
  handOver(
    kept: KeptDescriptors,
  ): Pick<HandOverState, 'times' | 'locks' | 'confinements' | 'autostart' | 'vtpms'> {
    this.#checkOpen();
    return {
      times: this.#times + 1,
      locks: locks.map((lock) => kept.keep(lock)),
      confinements: this.#context.confinements.handOver(kept),
      autostart: [...this.#toStart].map(({ entry }) => entry.id),
      vtpms: this.all().map((vtpm) => vtpm.handOver(kept)),
    };
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
    if (this.#isHeld)
      throw new ToolstackError('busy', 'the supervisor is being upgraded; try again in a moment');
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
      this.#toStart.delete(vtpm);
      setPassage(this.#context.paths, this.#context.list.all());
    });
  }

  /** Stops every worker, in order. */
  async close(): Promise<void> {
    this.#closing.abort();
    for (const vtpm of this.all()) vtpm.release();
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
  async #startAll(): Promise<void> {
    const { signal } = this.#closing;
    const isOver = (): boolean => signal.aborted || this.#isHeld;
    while (this.#toStart.size > 0 && !isOver()) {
      const health = await this.#admin.health().catch(() => undefined);
      if (health?.status === 'ready') break;
      await delay(AUTOSTART_RETRY_MS, undefined, { signal }).catch(() => undefined);
    }
    await inParallel(PARALLEL_STARTS, [...this.#toStart], async (vtpm) => {
      if (isOver()) return;
      this.#toStart.delete(vtpm);
      if (vtpm.state !== 'stopped') return;
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

/** Those that are handed over are held already, and were never let go. */
function takeLocks({ supervisor }: Paths, before: Inheritance | undefined): void {
  // Another installation may have been given the same --run-dir.
  for (const [index, path] of [supervisor.lock, `${supervisor.socket}.lock`].entries()) {
    if (before) {
      locks.push(before.descriptors.takeFile(before.state.locks[index] ?? -1, path));
      continue;
    }
    const lock = lockFile(path);
    if (lock === undefined) {
      throw new ToolstackError('in-use', `another vtpm-supervisord holds ${path}; stop it first`);
    }
    locks.push(lock);
  }
}

async function adoptAll(
  context: VtpmContext,
  { state, descriptors }: Inheritance,
): Promise<Map<string, Vtpm>> {
  const adopted = new Map<string, Vtpm>();
  for (const before of state.vtpms) {
    const entry = context.list.get(before.id);
    if (entry) {
      adopted.set(entry.id, await Vtpm.adopt(context, entry, before, descriptors));
    } else {
      context.log.error(
        { vtpm: before.id },
        'a vTPM that was handed over is not in the list; its worker is ended',
      );
      await killAndWait(before.served?.worker?.processes ?? []);
    }
  }
  return adopted;
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
