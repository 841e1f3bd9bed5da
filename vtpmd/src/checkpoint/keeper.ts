import { createHash, hash } from 'node:crypto';
import { barrier } from 'vtpm-common/barrier';
import { framed } from '../channels/framing.js';
import type { HandleOwners } from '../channels/handle-owners.js';
import type { TpmEngine } from '../engine/engine.js';
import { VtpmdError } from '../error.js';
import type { CommandSource } from '../worker/command-source.js';
import type { OutagePolicy } from '../worker/outage-policy.js';
import type { GrantedState } from './choose.js';
import { type CheckpointMemory, SLOTS, type Slot } from './memory.js';
import { NoEffect } from './no-effect.js';
import type { Answered, PowerNotes, Unit, UnitSealer } from './unit.js';

export interface KeeperParts {
  readonly memory: CheckpointMemory;
  readonly sealer: UnitSealer;
  readonly engine: TpmEngine;
  readonly owners: HandleOwners;
  readonly policy: OutagePolicy;
  readonly power: PowerNotes;
  /** The permanent state that the TPM started from. */
  readonly granted: GrantedState;
  /** Where a worker before this one came to, 0 for none: of its units and answers; `inUse` as in ChosenUnit. */
  readonly last: { readonly sequence: number; readonly unit: number; readonly inUse: readonly Slot[] };
}

/** Leaves, behind each command that changed something, what the next worker needs to go on from there. */
export class CheckpointKeeper {
  readonly noEffect = new NoEffect();
  readonly #parts: KeeperParts;
  #generation: bigint;
  #permanentDigest: Buffer;
  #sequence: number;
  #previous: number;
  /** The slot of the unit that the next one follows, and the one that a successor needs beside it: two at most. */
  #inUse: readonly Slot[];
  /** Number of the unit that holds the answer that is about to be given. */
  #answer: number | undefined;
  #controlAnswer: number | undefined;

  constructor(parts: KeeperParts) {
    this.#parts = parts;
    this.#generation = parts.granted.generation;
    this.#permanentDigest = Buffer.from(parts.granted.permanentDigest);
    this.#sequence = parts.last.sequence;
    this.#previous = parts.last.unit;
    this.#inUse = parts.last.inUse;
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
    const { command, connection, frame } = source;
    const sent = frame ? frame.around(command) : command;
    const answered =
      connection === undefined
        ? undefined
        : {
            isControl: false,
            connection,
            commandLength: sent.length,
            commandDigest: hash('sha256', sent, 'buffer'),
            response: frame ? framed(response) : response,
          };
    this.#write(answered, stored !== undefined);
    if (answered) this.#answer = this.#sequence;
  }

  /** A unit that stands for no command. */
  keepNow(): void {
    this.#answer = undefined;
    this.#write(undefined, false);
  }

  /** As `keep`, where something other than a command stored it. Its save follows, and is the next one. */
  keepSave(permanent: Buffer, answered?: Answered): void {
    this.saved(permanent, this.#generation + 1n);
    this.#keepAnswered(answered, true);
  }

  /** A control request had an effect, and stored nothing. */
  keepControl(answered: Answered | undefined): void {
    this.#keepAnswered(answered, false);
  }

  #keepAnswered(answered: Answered | undefined, stored: boolean): void {
    this.#answer = undefined;
    this.#write(answered, stored);
    if (answered) this.#controlAnswer = this.#sequence;
  }

  /** As `takeAnswerNumber`, for answers to control requests. */
  takeControlNumber(): number {
    const number = this.#controlAnswer ?? ++this.#sequence;
    this.#controlAnswer = undefined;
    return number;
  }

  /** Of the newest unit or answer. */
  get sequence(): number {
    return this.#sequence;
  }

  /** The number of the answer that is given now. They rise over the whole VM run. */
  takeAnswerNumber(): number {
    const number = this.#answer ?? ++this.#sequence;
    this.#answer = undefined;
    return number;
  }

  /**
   * A worker may end at any moment here, also after one that ended here, and its successor must find the newest whole unit
   * and, where the save of that one may not be committed, the one before it.
   *
   * Let N be the newest whole unit and P the one that it follows. `#inUse` covers both wherever both are needed: after this
   * worker wrote N it is theirs; when it went on from P, because N was not committed, it is theirs too; when it went on from
   * N, that was committed, and P is not needed. The slot that is opened is none of these, so until `close` a successor finds
   * what this worker found. With `close` the new unit is the newest and follows the first of `#inUse`, which stays.
   */
  #write(answered: Unit['answered'], stored: boolean): void {
    const { memory, sealer, engine, owners, policy, power } = this.#parts;
    const slot = SLOTS.find((one) => !this.#inUse.includes(one));
    if (slot === undefined) throw new VtpmdError('internal', 'no slot is free for a checkpoint');
    const sequence = ++this.#sequence;
    const room = memory.open(slot);
    const seal = (volatile: Buffer): number =>
      sealer.seal(
        {
          sequence,
          previous: this.#previous,
          generation: this.#generation,
          permanentDigest: this.#permanentDigest,
          stored,
          isFirmware: policy.isFirmware,
          power,
          volatile,
          owners: owners.serialised(),
          answered,
        },
        room,
      );
    const length = power.isOff ? seal(NOTHING) : engine.useVolatileState(seal);
    barrier('half-checkpoint');
    memory.close(slot, sequence, length);
    this.#inUse = [slot, ...this.#inUse.slice(0, 1)];
    this.#previous = sequence;
  }
}

const NOTHING = Buffer.alloc(0);
