import type { SigningKey } from 'vtpm-proto';
import { ToolstackError } from '../error.js';
import type { AdminClient } from './admin-client.js';
import { Autostart } from './autostart.js';
import { setPassage } from './door-access.js';
import type { KeptDescriptors } from './handover/descriptors.js';
import type { HandOverState } from './handover/state.js';
import type { WorkerImage } from './image.js';
import { inParallel } from './in-parallel.js';
import { isWithin } from './is-within.js';
import type { ManagerEvents } from './manager-events.js';
import { MigrationDesk } from './migration/desk.js';
import { checkedNewEntry } from './new-vtpm.js';
import { Vtpm } from './vtpm.js';
import type { VtpmContext } from './vtpm-state.js';
import type { WorkerImages } from './worker-images.js';
import type { PoolView } from './worker-pool.js';

/** Stopping is mostly waiting. */
const PARALLEL_STOPS = 32;
/** A start whose worker does not come up takes longer; then the upgrade is refused. */
const HOLD_LIMIT_MS = 60_000;

export interface SupervisorParts {
  readonly context: VtpmContext;
  readonly images: WorkerImages;
  readonly delegateKey: SigningKey;
  readonly admin: AdminClient;
  readonly events: ManagerEvents;
  /** Descriptors that hold the installation. */
  readonly locks: readonly number[];
}

/** The parent of every worker of an installation. */
export class Supervisor {
  readonly #parts: SupervisorParts;
  readonly #context: VtpmContext;
  readonly #vtpms = new Map<string, Vtpm>();
  readonly #closing = new AbortController();
  readonly #autostart: Autostart;
  readonly #times: number;
  readonly #desk: MigrationDesk;
  #isHeld = false;

  /** @param vtpms all of the list @param before what is handed over, where something is */
  constructor(parts: SupervisorParts, vtpms: readonly Vtpm[], before: HandOverState | undefined) {
    this.#parts = parts;
    this.#context = parts.context;
    this.#times = before?.times ?? 0;
    for (const vtpm of vtpms) this.#vtpms.set(vtpm.entry.id, vtpm);
    const toStart = vtpms.filter(({ entry }) =>
      before ? before.autostart.includes(entry.id) : entry.autostart && entry.crashed === null,
    );
    this.#autostart = new Autostart(parts.admin, toStart, this.#closing.signal);
    const { launcher, paths, settings, log } = parts.context;
    this.#desk = new MigrationDesk({
      ...{ admin: parts.admin, launcher, paths, settings, log },
      all: () => this.all(),
      forget: (vtpm) => this.#forget(vtpm, true),
    });
    parts.events.listen(this.#desk);
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
    this.#autostart.hold();
    const areQuiet = Promise.all(this.all().map((vtpm) => vtpm.hold()));
    if (await isWithin(areQuiet, HOLD_LIMIT_MS)) return;
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
    this.#autostart.release();
    void this.#desk.look();
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
      locks: this.#parts.locks.map((lock) => kept.keep(lock)),
      confinements: this.#context.confinements.handOver(kept),
      autostart: this.#autostart.ids,
      vtpms: this.all().map((vtpm) => vtpm.handOver(kept)),
    };
  }

  get delegateKey(): SigningKey {
    return this.#parts.delegateKey;
  }

  /** From which workers are started. */
  get image(): WorkerImage {
    return this.#parts.images.current;
  }

  /** Starts workers from what is installed now. @param expected its digest, where only that one will do @throws ToolstackError `image-not-allowed` | … */
  refreshImage(expected?: string): WorkerImage {
    const image = this.#parts.images.refresh(expected);
    this.#context.pool.renew();
    return image;
  }

  get managerConnected(): boolean {
    return this.#parts.events.isConnected;
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
    const entry = checkedNewEntry(body, this.#context);
    this.#context.list.add(entry);
    this.#setPassage();
    const vtpm = new Vtpm(this.#context, entry);
    this.#vtpms.set(entry.id, vtpm);
    return vtpm;
  }

  /** Forgets a vTPM; its state at the manager stays. @throws ToolstackError `not-stopped` | `busy` */
  remove(vtpm: Vtpm): Promise<void> {
    return this.#forget(vtpm, false);
  }

  #forget(vtpm: Vtpm, hasNotCome: boolean): Promise<void> {
    return vtpm.remove(() => {
      this.#context.list.remove(vtpm.entry.id);
      this.#vtpms.delete(vtpm.entry.id);
      this.#autostart.forget(vtpm);
      this.#setPassage();
    }, hasNotCome);
  }

  #setPassage(): void {
    const { paths, list, settings } = this.#context;
    setPassage(paths, list.all(), settings);
  }

  #closeList(): void {
    try {
      this.#context.list.close();
    } catch (error) {
      // It is complete with its journal.
      this.#context.log.warn({ reason: (error as Error).message }, 'the list of vTPMs keeps its journal');
    }
  }

  /** Stops every worker, in order. */
  async close(): Promise<void> {
    this.#closing.abort();
    this.#desk.close();
    for (const vtpm of this.all()) vtpm.release();
    await this.#parts.events.close();
    const isPoolEmpty = this.#context.pool.close();
    await inParallel(PARALLEL_STOPS, this.all(), async (vtpm) => {
      await vtpm.shutDown().catch((error: unknown) => {
        this.#context.log.error({ vtpm: vtpm.entry.name, reason: String(error) }, 'not stopped in order');
      });
    });
    await this.#autostart.settled;
    await isPoolEmpty;
    this.#closeList();
    this.#context.confinements.close();
  }
}
