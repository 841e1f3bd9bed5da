import { join } from 'node:path';
import type { Logger } from 'vtpm-common';
import type { DoorName, VmmStatus } from './control-protocol.js';
import type { Entry } from './entry.js';
import type { StandIn } from './migration/stand-in.js';
import type { ProcessId } from './processes.js';
import type { VtpmList } from './vtpm-list.js';
import type { VtpmContext, VtpmState } from './vtpm-state.js';

/** Hears what becomes of a vTPM that it started. */
export interface Attendant {
  /** One of the connections is over. */
  disconnected(connection: number, door: DoorName): void;
  /** The VMM needs the TPM no more. */
  shutDown(): void;
  /** The vTPM was stopped, or `reason` is why it crashed. */
  ended(reason: string | null): void;
}

/** What is known of one vTPM: its entry in the list, and what it is at the moment. */
export class VtpmStatus {
  readonly log: Logger;
  #state: VtpmState;
  /** Who started it through the drop-in commands, while it runs. */
  attendant: Attendant | undefined;
  /** What the worker said last of the VMM, where that powers the TPM. */
  vmm: VmmStatus | undefined;
  /** Has the VMM's connections while the TPM is on its way. */
  standIn: StandIn | undefined;
  /** What a kill could not end. No start while it is there. */
  lingering: readonly ProcessId[] = [];
  readonly #list: VtpmList;
  readonly #doors: string;
  #entry: Entry;
  /** What `tryUpdate` could not write. */
  #unwritten: Parameters<VtpmList['update']>[1] = {};

  constructor({ list, paths, log }: Pick<VtpmContext, 'list' | 'paths' | 'log'>, entry: Entry) {
    this.log = log.child({ vtpm: entry.name });
    this.#list = list;
    this.#doors = paths.supervisor.doors;
    this.#entry = entry;
    this.#state = stateAtRest(entry);
  }

  get state(): VtpmState {
    return this.#state;
  }

  set state(state: VtpmState) {
    this.#state = state;
    if (state.kind !== 'stopped' && state.kind !== 'crashed' && state.kind !== 'moved') return;
    const { attendant } = this;
    this.attendant = undefined;
    attendant?.ended(state.kind === 'crashed' ? state.reason : null);
  }

  get entry(): Entry {
    return this.#entry;
  }

  get doorsDirectory(): string {
    return join(this.#doors, this.#entry.name);
  }

  /** What the list says of it, while it has no worker. */
  rest(): void {
    this.state = stateAtRest(this.#entry);
  }

  /** No worker can be kept alive. */
  crashed(reason: string): void {
    this.state = { kind: 'crashed', reason };
    this.tryUpdate({ crashed: reason });
  }

  update(change: Parameters<VtpmList['update']>[1]): void {
    this.#entry = this.#list.update(this.#entry.id, { ...this.#unwritten, ...change });
    this.#unwritten = {};
  }

  /**
   * For events that nobody waits for. What is not written is written with the next change, or found again: `runningInBoot` still
   * stands in the list.
   */
  tryUpdate(change: Parameters<VtpmList['update']>[1]): void {
    try {
      this.update(change);
    } catch (error) {
      this.#unwritten = { ...this.#unwritten, ...change };
      this.log.error({ reason: (error as Error).message }, 'the list of vTPMs cannot be written');
    }
  }
}

function stateAtRest({ crashed, migration, moved }: Entry): VtpmState {
  if (migration?.role === 'departing') {
    return { kind: 'migrating', reason: `whether it went to ${migration.peer} is not known yet` };
  }
  if (migration) return { kind: 'arriving', reason: `it comes from ${migration.peer}`, worker: undefined };
  if (moved) return { kind: 'moved', reason: `it lives on ${moved.to} since ${moved.at}` };
  return crashed === null ? { kind: 'stopped', reason: null } : { kind: 'crashed', reason: crashed };
}
