import { barrier } from 'vtpm-common/barrier';
import type { HandleOwners } from '../channels/handle-owners.js';
import type { CheckpointKeeper } from '../checkpoint/keeper.js';
import type { Answered } from '../checkpoint/unit.js';
import { responseCode, shutdownClear, startupClear, TPM_RC_SUCCESS } from '../engine/command.js';
import type { TpmEngine } from '../engine/engine.js';
import { VtpmdError } from '../error.js';
import type { Identity } from '../manager-link/load.js';
import type { SaveSession } from '../manager-link/save-session.js';
import type { StateBlobs } from '../state-blob/state-blobs.js';
import type { CommandQueue } from './command-queue.js';
import type { OutagePolicy } from './outage-policy.js';
import type { PowerState } from './power-state.js';

export interface PowerParts {
  readonly engine: TpmEngine;
  readonly queue: CommandQueue;
  readonly session: SaveSession;
  readonly keeper: CheckpointKeeper | undefined;
  readonly owners: HandleOwners;
  readonly policy: OutagePolicy;
  readonly state: PowerState;
  readonly blobs: StateBlobs;
  readonly startup: Identity['startup'];
  /** Milliseconds that a power-on waits for a manager that is away. */
  readonly holdMs: number;
  /** The TPM was powered on or off. */
  changed(): void;
}

/** Leaves the checkpoint of a step that is done when `permanent` is saved. */
export type KeepSave = (permanent: Buffer) => void;

/** What is done while no command runs. */
export interface Step {
  /** The command that runs has its time: it is not cancelled. */
  readonly isPatient?: boolean;
  /**
   * @param keepSave called before a save of its own
   * @returns what it stored: that is saved before anybody hears of the step
   */
  run(keepSave: KeepSave): Promise<Buffer | undefined> | Buffer | undefined;
  /** A control request, whose answer is kept with the effect. */
  answered?(): Answered | undefined;
  /** The effect is durable; no command has run since. */
  done?(): void;
}

/**
 * The one place that turns the TPM on and off while its worker lives. Whoever asks has his turn when no command runs and
 * nothing waits to become durable, and commands wait meanwhile. A TPM that is off is its permanent state; nothing else
 * survives. Everything that happens here leaves a checkpoint.
 */
export class PowerSwitch {
  readonly #parts: PowerParts;
  #lane: Promise<void> = Promise.resolve();
  /** While it is off. */
  #permanent: Buffer | undefined;
  /** What is in `#permanent` is not durable yet. */
  #isUnsaved = false;
  #linkWaiters: (() => void)[] = [];

  constructor(parts: PowerParts) {
    this.#parts = parts;
  }

  get isOn(): boolean {
    return !this.#parts.state.isOff;
  }

  /** Resolves when nobody has his turn. */
  settled(): Promise<void> {
    return this.#lane;
  }

  /** At the start of a worker: the TPM that is off. It is copied. */
  setOff(permanent: Uint8Array): void {
    this.#permanent = Buffer.from(permanent);
    this.#parts.state.isOff = true;
  }

  /** The manager is there. */
  linkUp(): void {
    for (const resolve of this.#linkWaiters.splice(0)) resolve();
  }

  /** @throws what the step throws; VtpmdError `manager-away` */
  perform(step: Step): Promise<void> {
    const turn = this.#lane.then(() => this.#perform(step));
    this.#lane = turn.catch(() => undefined);
    return turn;
  }

  /** A power cycle where it is on. @throws VtpmdError `manager-away`, `engine`, `startup-failed`; the TPM is off then */
  on(): Promise<void> {
    return this.perform({ run: (keepSave) => this.turnOn(keepSave) });
  }

  off(): Promise<void> {
    return this.perform({ run: () => this.turnOff() });
  }

  /**
   * _TPM_Init, after cutting the power where it is on: from the state that was brought in, where some was. Only within a step.
   * @returns what it stored @throws as `on`
   */
  async turnOn(keepSave: KeepSave): Promise<Buffer | undefined> {
    await this.turnOff();
    await this.whenLinked();
    const { engine, state, policy, startup, blobs, keeper } = this.#parts;
    const own = this.#permanent;
    if (!own) throw new VtpmdError('internal', 'there is no state of the TPM that is off');
    const { permanent = own, volatile } = blobs.begin();
    if (state.bufferSize > 0) engine.setBufferSize(state.bufferSize);
    engine.powerOn({ permanent, volatile, manufacture: false });
    // Whether one that goes on was shut down is not known: one Shutdown more does no harm.
    state.isOrderly = volatile === undefined;
    policy.restore(startup === 'none' && volatile === undefined);
    const started = startup === 'clear' && !volatile ? this.#startUp() : undefined;
    let stored = started ?? engine.storedAtStart;
    if (this.#isUnsaved) stored ??= Buffer.from(permanent);
    state.isOff = false;
    await blobs.started((saved) => {
      stored = undefined;
      keepSave(saved);
    });
    this.#isUnsaved = false;
    this.#permanent = undefined;
    keeper?.noEffect.forget();
    for (const used of [own, permanent, volatile]) used?.fill(0);
    this.#parts.changed();
    return stored;
  }

  #startUp(): Buffer | undefined {
    const { engine, state } = this.#parts;
    const command = startupClear();
    const { response, stored } = engine.process(command);
    const code = responseCode(response);
    if (code !== TPM_RC_SUCCESS) {
      engine.powerOff().fill(0);
      throw new VtpmdError('startup-failed', `the TPM answered Startup with 0x${code.toString(16)}`);
    }
    state.ran(command, response, stored !== undefined);
    return stored;
  }

  /** Cuts the power, after a Shutdown(CLEAR) where the TPM needs one. Only within a step. */
  async turnOff(): Promise<undefined> {
    const { engine, queue, state, owners, blobs, keeper } = this.#parts;
    if (state.isOff) return;
    if (!blobs.isFrozen && queue.countGuesses()) this.#isUnsaved = true;
    // Where a reference to it is out, that is to the TPM as it is.
    if (!state.isOrderly && !blobs.isFrozen) await this.#shutDown();
    this.#permanent = engine.powerOff();
    state.isOff = true;
    state.isMeasuring = false;
    owners.release(() => true);
    // Before anybody hears of it, and whatever becomes of the power-on that this may be a part of.
    keeper?.keepNow();
    queue.powerOff();
    this.#parts.changed();
    return undefined;
  }

  /** What is known of the TPM that is off becomes durable. Only within a step. */
  async saveOff(): Promise<void> {
    const { keeper, session } = this.#parts;
    if (!this.#permanent || !this.#isUnsaved) return;
    keeper?.keepSave(this.#permanent);
    await session.save(this.#permanent);
    this.#isUnsaved = false;
  }

  async #perform(step: Step): Promise<void> {
    const { queue, keeper, session } = this.#parts;
    queue.hold(HOLD);
    try {
      await this.#whenIdle(step.isPatient === true);
      const keepSave: KeepSave = (permanent) => keeper?.keepSave(permanent, step.answered?.());
      const stored = await step.run(keepSave);
      if (stored) {
        keepSave(stored);
        await session.save(stored);
      } else {
        keeper?.keepControl(step.answered?.());
      }
      barrier('step-saved');
      step.done?.();
    } finally {
      queue.release(HOLD);
    }
  }

  /** In an outage a command, or what is done with a state blob, may wait without end for its acknowledgement. */
  async #whenIdle(isPatient: boolean): Promise<void> {
    const { queue, engine, blobs } = this.#parts;
    // What runs ends with the power anyway, and everything else waits for it.
    if (queue.current && !isPatient) engine.cancel();
    const isIdle = queue
      .whenIdle()
      .then(() => blobs.settled())
      .then(() => true);
    while (!(await this.#within(isIdle))) {
      if (queue.isOutage) throw managerAway();
    }
  }

  /** The manager is there, or comes in time. @throws VtpmdError `manager-away` */
  async whenLinked(): Promise<void> {
    const { queue } = this.#parts;
    if (!queue.isOutage) return;
    const isUp = new Promise<boolean>((resolve) => this.#linkWaiters.push(() => resolve(true)));
    if (!(await this.#within(isUp))) throw managerAway();
  }

  async #within(promise: Promise<boolean>): Promise<boolean> {
    let timer: NodeJS.Timeout | undefined;
    const isLate = new Promise<boolean>((resolve) => {
      timer = setTimeout(() => resolve(false), this.#parts.holdMs);
    });
    try {
      return await Promise.race([promise, isLate]);
    } finally {
      clearTimeout(timer);
    }
  }

  /** The TPM would count its next start as a wrong authorisation without it. */
  async #shutDown(): Promise<void> {
    const { engine, queue, session, keeper, state } = this.#parts;
    const command = shutdownClear();
    const { response, stored } = engine.process(command);
    state.ran(command, response, stored !== undefined);
    if (!stored) return;
    if (queue.isOutage) {
      // The power is cut all the same: nobody was told of this, and the next power-on saves it.
      this.#isUnsaved = true;
      return;
    }
    keeper?.keepSave(stored);
    await session.save(stored);
  }
}

const HOLD = 'power';

function managerAway(): VtpmdError {
  return new VtpmdError(
    'manager-away',
    'the manager is away, and no VM powers on without it; reset the VM when it is back',
  );
}
