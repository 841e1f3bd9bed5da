import type { CheckpointKeeper } from '../checkpoint/keeper.js';
import { isLocality, type TpmEngine } from '../engine/engine.js';
import type { StateBlobs } from '../state-blob/state-blobs.js';
import type { CommandQueue } from '../worker/command-queue.js';
import type { PowerState } from '../worker/power-state.js';
import type { PowerSwitch } from '../worker/power-switch.js';
import { expectStirred, freshStir } from '../worker/trial.js';
import type { Actions, Outcome, VmmState } from './actions.js';
import { commonActions, DONE } from './common-actions.js';
import type { DataChannel } from './data-channel.js';
import { ControlRefusal, RESULT } from './results.js';
import { blobOutcome, blobTypeOf } from './state-blob-requests.js';

export interface ServedParts {
  readonly engine: TpmEngine;
  readonly queue: CommandQueue;
  readonly keeper: CheckpointKeeper | undefined;
  readonly power: PowerSwitch;
  readonly state: PowerState;
  readonly blobs: StateBlobs;
  readonly vmm: VmmState;
  readonly data: DataChannel;
}

/** INIT's only flag: the volatile state is not used again. It never is. */
const INIT_DELETE_VOLATILE = 1;

/** The commands for a TPM that is served. */
export function servedActions(parts: ServedParts): Actions {
  const { engine, queue, keeper, power, state, blobs, vmm, data } = parts;
  const measurement = new Measurement(parts);
  const off = async (): Promise<Outcome> => {
    await power.turnOff();
    measurement.over();
    blobs.stopped();
    return DONE;
  };
  const common = commonActions({
    ...{ engine, vmm, data },
    isOn: () => engine.isOn,
    bufferSizeChanged: () => {
      state.bufferSize = engine.bufferSizes.size;
      keeper?.keepControl(undefined);
    },
  });
  return {
    ...common,
    SET_DATAFD: async (request, asker, keepSave) => {
      // The VMM that took the TPM out is gone, and this is another one: what it sends must not take the reference back.
      if (blobs.isFrozen && !data.isOpen) {
        await power.off();
        blobs.stopped();
      }
      return await common.SET_DATAFD(request, asker, keepSave);
    },

    INIT: async ({ body }, _asker, keepSave) => {
      if ((body.readUInt32BE(0) & ~INIT_DELETE_VOLATILE) !== 0) {
        throw new ControlRefusal(RESULT.BadParameter, 'INIT with a flag that nobody knows');
      }
      const stored = await power.turnOn(keepSave);
      measurement.over();
      return { ...DONE, stored, isOnce: true };
    },
    STOP: off,
    // The door stays, for the next VMM.
    SHUTDOWN: off,

    // The bit, then three bytes of padding.
    GET_TPMESTABLISHED: () => ({ ...DONE, words: [engine.established ? 0x01000000 : 0] }),
    RESET_TPMESTABLISHED: ({ body }) => {
      const locality = body.readUInt8(0);
      if (!isLocality(locality) || !engine.resetEstablished(locality)) {
        throw new ControlRefusal(
          RESULT.BadLocality,
          `no reset of the established bit at locality ${locality}`,
        );
      }
      return DONE;
    },
    CANCEL_TPM_CMD: () => {
      if (queue.current?.kind === 'vmm-data') engine.cancel();
      return DONE;
    },

    HASH_START: () => measurement.start(),
    HASH_DATA: ({ content }) => measurement.add(content),
    HASH_END: () => measurement.end(),

    STORE_VOLATILE: () => {
      // Each command leaves a checkpoint, and this request one more: that is all that survives this worker.
      if (!keeper) throw new ControlRefusal(RESULT.IoError, 'nothing is check-pointed');
      return DONE;
    },
    GET_STATEBLOB: async (request) => {
      const type = blobTypeOf(request);
      return blobOutcome(request, type, await blobs.takeOut(type));
    },
    SET_STATEBLOB: (request) => {
      blobs.bringIn(blobTypeOf(request), request.content);
      return DONE;
    },
    LOCK_STORAGE: async () => {
      // A vTPM is its worker's alone for as long as that lives. What may be out is a reference to its state.
      await blobs.takeBack();
      return DONE;
    },
  };
}

/** HASH_START to HASH_END. Any command would end it without an effect, so all wait until it is over. */
class Measurement {
  readonly #parts: ServedParts;
  /** A worker before this one began it: the generator stands where it stood at the checkpoint. */
  #mustStir: boolean;

  constructor(parts: ServedParts) {
    this.#parts = parts;
    this.#mustStir = parts.state.isMeasuring;
    if (this.#mustStir) parts.queue.hold(MEASURING);
  }

  start(): Outcome {
    const { engine, state, queue } = this.#parts;
    const stored = engine.hash('start');
    queue.hold(MEASURING);
    state.isMeasuring = true;
    return { ...DONE, stored, isOnce: true };
  }

  add(content: Buffer): Outcome {
    this.#expectBegun();
    return { ...DONE, stored: this.#parts.engine.hash(content), isOnce: true };
  }

  end(): Outcome {
    this.#expectBegun();
    const stored = this.#parts.engine.hash('end');
    return { ...DONE, stored: this.over() ?? stored, isOnce: true };
  }

  /** Commands may run. @returns what stirring stored */
  over(): Buffer | undefined {
    const { engine, state, queue } = this.#parts;
    let stored: Buffer | undefined;
    if (this.#mustStir && engine.isOn) {
      const processed = engine.process(freshStir());
      expectStirred(processed.response);
      stored = processed.stored;
    }
    this.#mustStir = false;
    state.isMeasuring = false;
    queue.release(MEASURING);
    return stored;
  }

  #expectBegun(): void {
    if (this.#parts.state.isMeasuring) return;
    throw new ControlRefusal(RESULT.BadOrdinal, 'no measurement was begun');
  }
}

const MEASURING = 'measuring';
