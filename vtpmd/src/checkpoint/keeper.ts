import { createHash, hash } from 'node:crypto';
import { barrier } from 'vtpm-common/barrier';
import type { HandleOwners } from '../channels/handle-owners.js';
import type { TpmEngine } from '../engine/engine.js';
import type { CommandSource } from '../worker/command-queue.js';
import type { OutagePolicy } from '../worker/outage-policy.js';
import type { GrantedState } from './choose.js';
import type { CheckpointMemory } from './memory.js';
import { NoEffect } from './no-effect.js';
import type { Unit, UnitSealer } from './unit.js';

export interface KeeperParts {
  readonly memory: CheckpointMemory;
  readonly sealer: UnitSealer;
  readonly engine: TpmEngine;
  readonly owners: HandleOwners;
  readonly policy: OutagePolicy;
  /** The permanent state that the TPM started from. */
  readonly granted: GrantedState;
  /** Where a worker before this one came to, 0 for none: of its units and answers, and the slot that is in use. */
  readonly last: { readonly sequence: number; readonly unit: number; readonly slot: number };
}

/** Leaves, behind each command that changed something, what the next worker needs to go on from there. */
export class CheckpointKeeper {
  readonly noEffect = new NoEffect();
  readonly #parts: KeeperParts;
  #generation: bigint;
  #permanentDigest: Buffer;
  #sequence: number;
  #previous: number;
  #slot: number;
  /** Number of the unit that holds the answer that is about to be given. */
  #answer: number | undefined;

  constructor(parts: KeeperParts) {
    this.#parts = parts;
    this.#generation = parts.granted.generation;
    this.#permanentDigest = Buffer.from(parts.granted.permanentDigest);
    this.#sequence = parts.last.sequence;
    this.#previous = parts.last.unit;
    this.#slot = parts.last.slot;
  }

  /** A save without a command: the permanent state, and what it became. */
  saved(permanent: Uint8Array, generation: bigint): void {
    this.#permanentDigest = createHash('sha256').update(permanent).digest();
    this.#generation = generation;
  }

  /**
   * After a command ran, before anything it stored is saved and before its answer leaves. The save of `stored` becomes
   * the next generation.
   */
  keep(source: CommandSource, response: Buffer, stored: Buffer | undefined): void {
    this.#answer = undefined;
    const isRead = this.noEffect.covers(source.command, response);
    if (stored) this.saved(stored, this.#generation + 1n);
    else if (isRead) return;
    const { command, connection } = source;
    const answered =
      connection === undefined
        ? undefined
        : {
            connection,
            commandLength: command.length,
            commandDigest: hash('sha256', command, 'buffer'),
            response,
          };
    this.#write(answered, stored !== undefined);
    if (answered) this.#answer = this.#sequence;
  }

  /** A unit that stands for no command. */
  keepNow(): void {
    this.#write(undefined, false);
  }

  /** The number of the answer that is given now. They rise over the whole VM run. */
  takeAnswerNumber(): number {
    const number = this.#answer ?? ++this.#sequence;
    this.#answer = undefined;
    return number;
  }

  #write(answered: Unit['answered'], stored: boolean): void {
    const { memory, sealer, engine, owners, policy } = this.#parts;
    const slot = 1 - this.#slot;
    const sequence = ++this.#sequence;
    const room = memory.open(slot);
    const length = engine.useVolatileState((volatile) =>
      sealer.seal(
        {
          sequence,
          previous: this.#previous,
          generation: this.#generation,
          permanentDigest: this.#permanentDigest,
          stored,
          isFirmware: policy.isFirmware,
          volatile,
          owners: owners.serialised(),
          answered,
        },
        room,
      ),
    );
    barrier('half-checkpoint');
    memory.close(slot, sequence, length);
    this.#slot = slot;
    this.#previous = sequence;
  }
}
