import { ToolstackError } from '../../error.js';
import type { Incoming } from '../admin-client.js';
import type { EntryMigration } from '../entry.js';
import type { Operations } from '../operations.js';
import type { VtpmContext } from '../vtpm-state.js';
import type { VtpmStatus } from '../vtpm-status.js';
import { type Arrived, breakOffArrival, settleArrival, takeIn } from './arrival.js';
import { Departure, settleDeparture } from './departure.js';
import type { Description } from './description.js';
import type { Order } from './order.js';
import type { ProgressLine } from './progress.js';
import type { TravellingWorkers } from './travelling-workers.js';
import { elsewhere, isElsewhere } from './whereabouts.js';

export interface TravelsParts {
  readonly context: Pick<VtpmContext, 'admin' | 'paths' | 'settings'>;
  readonly status: VtpmStatus;
  readonly workers: TravellingWorkers;
  readonly operations: Operations;
}

/** How one vTPM goes to another host and comes from one, by request. */
export class Travels {
  readonly #parts: TravelsParts;
  #departure: Departure | undefined;

  constructor(parts: TravelsParts) {
    this.#parts = parts;
  }

  /**
   * It leaves for another host, or is tried to. Resolves when the last progress was told.
   * @throws ToolstackError where nothing has begun
   */
  leave(order: Order, onProgress: (line: ProgressLine) => void): Promise<void> {
    const { status, operations } = this.#parts;
    return operations.exclusively('migrated', async () => {
      const { state, entry } = status;
      if (isElsewhere(state)) throw elsewhere(entry, state);
      const wanted = order.mode === 'OFFLINE' ? 'stopped' : 'running';
      if (state.kind !== wanted) {
        throw new ToolstackError(
          order.mode === 'OFFLINE' ? 'not-stopped' : 'not-running',
          `vTPM ${entry.name} is ${state.kind}, and the order is for one that is ${wanted}`,
        );
      }
      if (order.mode === 'VMM') this.#checkMovesWithVmm();
      this.#departure = new Departure({ ...this.#parts, order, onProgress });
      try {
        await this.#departure.run();
      } finally {
        this.#departure = undefined;
      }
    });
  }

  #checkMovesWithVmm(): void {
    const { context, status } = this.#parts;
    const { name, doors, stateBlobs } = status.entry;
    if (context.settings.checkpoint === 'off') {
      throw new ToolstackError(
        'bad-request',
        `vTPM ${name} cannot move with its VM while nothing is check-pointed: where its VM goes on here after all, its TPM would ` +
          'be lost. Set checkpoint to always, start the supervisor again, and restart the VM',
      );
    }
    if (doors.includes('control') && stateBlobs === 'reference') return;
    throw new ToolstackError(
      'bad-request',
      `vTPM ${name} cannot move with its VM: that takes the door "control", and state blobs that are references. ` +
        'With --state-blobs plain its VMM carries the state itself, and no manager is asked; stopped it moves without its VM',
    );
  }

  /** @returns false where its state is on its way already @throws ToolstackError `unknown-migration` | `migrating` | `moved` */
  cancel(): boolean {
    const { state, entry } = this.#parts.status;
    if (this.#departure) return this.#departure.cancel();
    if (isElsewhere(state)) throw elsewhere(entry, state);
    throw new ToolstackError(
      'unknown-migration',
      `vTPM ${entry.name} is not being migrated; vtpmctl migrate status shows what is`,
    );
  }

  /** One that was here comes back, as it was run last. @throws ToolstackError `busy` | `not-stopped` */
  expect(migration: EntryMigration, { doors, startup }: Description): Promise<void> {
    const { status, operations } = this.#parts;
    return operations.exclusively('taken in', async () => {
      const { state, entry } = status;
      if (state.kind !== 'moved') {
        throw new ToolstackError('not-stopped', `vTPM ${entry.name} is ${state.kind} here`);
      }
      status.update({ migration, doors, startup });
      status.rest();
    });
  }

  /** @throws ToolstackError where it is not known what came of it */
  async takeIn(incoming: Incoming): Promise<Arrived> {
    let arrived: Arrived = 'pending';
    await this.#parts.operations.exclusively('taken in', async () => {
      arrived = await takeIn(this.#parts, incoming);
    });
    return arrived;
  }

  /** Asks the manager what came of it. @throws ToolstackError */
  async settle(): Promise<Arrived> {
    const { status, operations } = this.#parts;
    let settled: Arrived = 'pending';
    await operations.exclusively('settled', async () => {
      // It goes on, which may take longer: what came of it is known.
      if (status.state.kind === 'restarting') return;
      if (status.entry.migration?.role === 'arriving') settled = await settleArrival(this.#parts);
      else settled = (await settleDeparture(this.#parts)) ? 'here' : 'pending';
    });
    return settled;
  }

  /** For the end of the supervisor: nothing new begins. */
  cancelDeparture(): void {
    this.#departure?.cancel();
  }

  /** For the end of the supervisor, when nothing is under way: the next one asks what came of it. */
  async breakOff(): Promise<void> {
    const { status, workers } = this.#parts;
    await breakOffArrival(this.#parts);
    if (status.state.kind === 'migrating') workers.gone();
  }
}
