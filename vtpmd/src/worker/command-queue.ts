import { barrier } from 'vtpm-common/barrier';
import { errorResponse, HEADER_BYTES, TPM_RC_RETRY } from '../engine/command.js';
import type { Processed, TpmEngine } from '../engine/engine.js';
import { VtpmdError } from '../error.js';
import { type CommandSource, refuse, stayingSource } from './command-source.js';
import { DueTimes } from './due-times.js';
import type { OutagePolicy } from './outage-policy.js';
import { runCommand } from './run-command.js';
import { expectStirred, freshStir, type Trial, Trials } from './trial.js';

export interface CommandQueueOptions {
  readonly engine: TpmEngine;
  /**
   * Makes permanent state durable. `undefined`: it is already. Once this fails no answer ever leaves again, and
   * `onFailure` is called.
   */
  persist(permanent: Buffer): Promise<void> | undefined;
  /** Sees each command that ran, before its answer leaves. */
  observe?(source: CommandSource, command: Buffer, response: Buffer, stored: Buffer | undefined): void;
  /** Sees the same, and what the command stored, before that is saved: a worker after this one goes on from here. */
  keep?(source: CommandSource, response: Buffer, stored: Buffer | undefined): void;
  /** The TPM is off: commands are answered with TPM_RC_FAILURE. */
  isOff?(): boolean;
  /** What to do with commands between `outage` and `outageOver`. Without it they only wait. */
  readonly policy?: OutagePolicy;
  /** Sees each command that cannot run at once, when it waits already. */
  onWaiting?(source: CommandSource): void;
  onFailure(error: VtpmdError): void;
}

/**
 * The one queue in front of the one TPM, shared by all doors. Durable before visible: from the moment a command stored
 * permanent state until that state is durable, no command runs and no answer leaves, on any door. So nobody ever sees,
 * directly or by reading it back, an effect that a crash can undo. A command that ran is answered with its own answer
 * or not at all.
 *
 * In an outage nothing can be made durable. A command waits for its time, and then it is tried: if it stored something
 * the TPM is put back to where it was before, and the answer is TPM_RC_RETRY (try again, the command did not run). What
 * was running or waited for its acknowledgement when the outage began cannot be put back, because the manager may have
 * committed it, so it waits to the end, and everything else with it.
 */
export class CommandQueue {
  readonly #options: CommandQueueOptions;
  readonly #waiting: CommandSource[] = [];
  readonly #holds = new Set<string>();
  /** Wrong authorisations that were undone and are to be counted. They wait, too. */
  readonly #guesses = new Set<CommandSource>();
  readonly #idleWaiters: (() => void)[] = [];
  readonly #trials: Trials;
  /** When the commands that wait may be tried; only in an outage. */
  #due: DueTimes | undefined;
  #current: CommandSource | undefined;
  #isDead = false;

  constructor(options: CommandQueueOptions) {
    this.#options = options;
    this.#trials = new Trials(options.engine);
  }

  /** The source whose command runs or waits to become durable. */
  get current(): CommandSource | undefined {
    return this.#current;
  }

  /** Nothing can be made durable. */
  get isOutage(): boolean {
    return this.#due !== undefined;
  }

  /** Runs the command at once where the TPM is free; `answer` may be called before this returns. */
  submit(source: CommandSource): void {
    if (this.#options.isOff?.()) {
      refuse(source);
      return;
    }
    if (this.#canRun() && this.#waiting.length === 0) {
      this.#run(source);
      if (this.#waiting.length > 0) this.#pump();
      return;
    }
    source.command = Buffer.from(source.command);
    this.#waiting.push(source);
    this.#due?.schedule(source);
    this.#options.onWaiting?.(source);
  }

  /** As `submit`, before everything that waits. */
  submitFirst(source: CommandSource): void {
    if (this.#options.isOff?.()) {
      refuse(source);
      return;
    }
    this.#waiting.unshift(source);
    if (this.#due) this.#due.schedule(source);
    else this.#pump();
  }

  hasWaiting(matches: (source: CommandSource) => boolean): boolean {
    return this.#waiting.some((source) => !source.isGone && matches(source));
  }

  /**
   * Gives a command up. One that waits never runs, and neither `answer` nor `dropped` is called; of one that runs the TPM is
   * asked to end early, which few commands do, and its answer comes. @returns whether it waited
   */
  cancel(source: CommandSource): boolean {
    if (this.#current === source) {
      this.#options.engine.cancel();
      return false;
    }
    const index = this.#waiting.indexOf(source);
    if (index < 0) return false;
    this.#waiting.splice(index, 1);
    this.#due?.forget(source);
    return true;
  }

  /** Commands that wait and whose sources are gone, whatever holds the queue. */
  dropGone(): void {
    for (const source of this.#waiting.filter(({ isGone }) => isGone)) {
      if (this.cancel(source)) source.dropped();
    }
  }

  /** No command starts until `release` with the same reason. What runs goes on to its end. */
  hold(reason: string): void {
    this.#holds.add(reason);
  }

  release(reason: string): void {
    if (this.#holds.delete(reason)) this.#pump();
  }

  /** From now on nothing can be made durable. */
  outage(): void {
    if (this.#due) return;
    this.#holds.add(OUTAGE);
    const { policy } = this.#options;
    policy?.begin();
    this.#due = new DueTimes(policy, () => this.#guard(() => this.#tryDue()));
    for (const source of this.#waiting) this.#due.schedule(source);
  }

  /** Everything goes on. */
  outageOver(): void {
    if (!this.#due) return;
    this.#due.end();
    this.#due = undefined;
    if (this.#trials.mustStir) this.#waiting.unshift(this.#stirSource());
    this.release(OUTAGE);
  }

  /**
   * Before the power is cut: wrong authorisations that were undone are counted, because nothing that waits will run. Nobody
   * gets these answers, so nothing of a generator that was not stirred is given out. Only while nothing runs.
   * @returns whether there were any: what the TPM stored is to be saved
   */
  countGuesses(): boolean {
    const { engine, observe } = this.#options;
    for (const source of this.#guesses) {
      const { response, stored } = engine.process(source.command, source.locality);
      observe?.(source, source.command, response, stored);
      stored?.fill(0);
    }
    const counted = this.#guesses.size > 0;
    this.#guesses.clear();
    return counted;
  }

  /** The TPM is off now: nothing that waits will run. Only while nothing runs. */
  powerOff(): void {
    this.#guesses.clear();
    const waiting = this.#waiting.splice(0);
    for (const source of waiting) {
      this.#due?.forget(source);
      if (source.isGone) source.dropped();
      else refuse(source);
    }
  }

  /** Nothing runs and nothing is answered from now on, not even what ran already. */
  kill(): void {
    this.#isDead = true;
  }

  /** Resolves when no command runs and nothing waits to become durable. With a hold: when the TPM is at rest. */
  whenIdle(): Promise<void> {
    if (!this.#current) return Promise.resolve();
    return new Promise((resolve) => this.#idleWaiters.push(resolve));
  }

  #canRun(): boolean {
    return this.#current === undefined && this.#holds.size === 0 && !this.#isDead;
  }

  #pump(): void {
    if (this.#due) {
      this.#tryDue();
      return;
    }
    for (let ran = 0; this.#canRun(); ran++) {
      // Clients that never pause must not keep the supervisor and the manager waiting.
      if (ran === PUMP_BUDGET) {
        setImmediate(() => this.#pump());
        return;
      }
      const source = this.#waiting.shift();
      if (!source) return;
      if (source.isGone) source.dropped();
      else this.#run(source);
    }
  }

  #run(source: CommandSource): void {
    this.#current = source;
    this.#guesses.delete(source);
    try {
      barrier('before-process');
      this.#process(source, (processed, wasAsync) => this.#processed(source, processed, wasAsync));
    } catch (error) {
      this.#fail(error);
    }
  }

  /** `done` is called at once, or later where the command is slow. */
  #process(source: CommandSource, done: (processed: Processed, wasAsync: boolean) => void): void {
    const processed = runCommand(this.#options.engine, source);
    if (!(processed instanceof Promise)) {
      done(processed, false);
      return;
    }
    processed.then(
      (late) => this.#guard(() => done(late, true)),
      (error: unknown) => this.#fail(error),
    );
  }

  #processed(source: CommandSource, processed: Processed, wasAsync: boolean): void {
    if (this.#isDead) return;
    barrier('after-process');
    const { response, stored } = processed;
    if (response.length < HEADER_BYTES) throw new VtpmdError('engine', 'libtpms gave no response');
    this.#options.observe?.(source, source.command, response, stored);
    if (this.#options.keep) {
      barrier('before-checkpoint');
      this.#options.keep(source, response, stored);
      barrier('after-checkpoint');
    }
    const saving = stored && this.#options.persist(stored);
    if (saving) {
      saving.then(
        () => this.#guard(() => this.#finish(source, response, true, true)),
        (error: unknown) => this.#fail(error),
      );
      return;
    }
    this.#finish(source, response, stored !== undefined, wasAsync);
  }

  /** Tries what has waited long enough, where nothing but the outage is in the way. */
  #tryDue(): void {
    while (this.#due && !this.#isDead && !this.#current && this.#holds.size === 1) {
      const due = this.#due;
      const now = performance.now();
      const index = this.#waiting.findIndex((one) => one.isGone || due.isDue(one, now));
      const source = this.#waiting[index];
      if (!source) {
        due.wait();
        return;
      }
      if (!source.isGone && !this.#options.policy?.mayTry(source.command)) {
        due.never(source);
        continue;
      }
      this.#waiting.splice(index, 1);
      due.forget(source);
      if (source.isGone) source.dropped();
      else this.#try(source);
    }
  }

  #try(source: CommandSource): void {
    this.#current = source;
    this.#guesses.delete(source);
    this.#guard(() => {
      barrier('before-process');
      const trial = this.#trials.begin();
      this.#process(source, (processed, wasAsync) => this.#tried(source, trial, processed, wasAsync));
    });
  }

  #tried(source: CommandSource, trial: Trial, processed: Processed, wasAsync: boolean): void {
    if (this.#isDead) return;
    const stored = processed.stored ?? trial.stored;
    if (stored === undefined || !this.#due) {
      // Nothing to save, or somebody to save it again.
      trial.keep();
      this.#processed(source, { response: processed.response, stored }, wasAsync);
      return;
    }
    const isGuess = this.#options.policy?.undone(processed.response) === true;
    stored.fill(0);
    trial.undo();
    this.#current = undefined;
    if (isGuess || source.kind === undefined) {
      // It runs when the manager is back, whether somebody still waits for its answer or not.
      const kept = stayingSource(source);
      this.#waiting.unshift(kept);
      if (isGuess) this.#guesses.add(kept);
      this.#due.never(kept);
    } else {
      source.answer(errorResponse(TPM_RC_RETRY));
    }
    this.#notifyIdle();
    if (wasAsync) this.#pump();
  }

  #stirSource(): CommandSource {
    return {
      command: freshStir(),
      isGone: false,
      answer: (response) => {
        expectStirred(response);
        this.#trials.stirred();
      },
      dropped: () => {},
    };
  }

  #notifyIdle(): void {
    if (this.#idleWaiters.length > 0) for (const resolve of this.#idleWaiters.splice(0)) resolve();
  }

  #finish(source: CommandSource, response: Buffer, wasStored: boolean, mustPump: boolean): void {
    if (this.#isDead) return;
    if (wasStored) barrier('after-ack');
    source.answer(response);
    this.#current = undefined;
    this.#notifyIdle();
    if (mustPump) this.#pump();
  }

  #guard(step: () => void): void {
    try {
      step();
    } catch (error) {
      this.#fail(error);
    }
  }

  #fail(error: unknown): void {
    this.#isDead = true;
    this.#options.onFailure(VtpmdError.from(error));
  }
}

const OUTAGE = 'outage';

/** Commands that run before the event loop gets a turn. */
const PUMP_BUDGET = 64;
