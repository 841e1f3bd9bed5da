import { barrier } from 'vtpm-common/barrier';
import type { HandleOwner } from '../channels/handle-owners.js';
import { commandCode, HEADER_BYTES, isSlow } from '../engine/command.js';
import type { Processed, TpmEngine } from '../engine/engine.js';
import { VtpmdError } from '../error.js';

/** Who sends commands: one connection, or the worker itself. It has at most one command in the queue. */
export interface CommandSource {
  /** The command, of HEADER_BYTES at least. The queue replaces it by a copy where it has to wait. */
  command: Buffer;
  /** Of what the command loads into the TPM. */
  readonly owner?: HandleOwner | undefined;
  /** True once nobody waits for the answer: a command that did not run yet is dropped. */
  readonly isGone: boolean;
  /** The command's own answer, a view that is valid during the call. */
  answer(response: Buffer): void;
  /** Instead of `answer`: the command was dropped and did not run. */
  dropped(): void;
}

export interface CommandQueueOptions {
  readonly engine: TpmEngine;
  /**
   * Makes permanent state durable. `undefined`: it is already. Once this fails no answer ever leaves again, and
   * `onFailure` is called.
   */
  persist(permanent: Buffer): Promise<void> | undefined;
  /** Sees each command that ran, before its answer leaves. */
  observe?(source: CommandSource, command: Buffer, response: Buffer): void;
  onFailure(error: VtpmdError): void;
}

/**
 * The one queue in front of the one TPM, shared by all doors. Durable before visible: from the moment a command stored
 * permanent state until that state is durable, no command runs and no answer leaves, on any door. So nobody ever sees,
 * directly or by reading it back, an effect that a crash can undo. A command that ran is answered with its own answer
 * or not at all.
 */
export class CommandQueue {
  readonly #options: CommandQueueOptions;
  readonly #waiting: CommandSource[] = [];
  readonly #holds = new Set<string>();
  readonly #idleWaiters: (() => void)[] = [];
  #current: CommandSource | undefined;
  #isDead = false;

  constructor(options: CommandQueueOptions) {
    this.#options = options;
  }

  /** The source whose command runs or waits to become durable. */
  get current(): CommandSource | undefined {
    return this.#current;
  }

  /** Runs the command at once where the TPM is free; `answer` may be called before this returns. */
  submit(source: CommandSource): void {
    if (this.#canRun() && this.#waiting.length === 0) {
      this.#run(source);
      if (this.#waiting.length > 0) this.#pump();
      return;
    }
    source.command = Buffer.from(source.command);
    this.#waiting.push(source);
  }

  /** As `submit`, before everything that waits. */
  submitFirst(source: CommandSource): void {
    this.#waiting.unshift(source);
    this.#pump();
  }

  /** No command starts until `release` with the same reason. What runs goes on to its end. */
  hold(reason: string): void {
    this.#holds.add(reason);
  }

  release(reason: string): void {
    if (this.#holds.delete(reason)) this.#pump();
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
    try {
      barrier('before-process');
      if (isSlow(commandCode(source.command))) {
        source.command = Buffer.from(source.command);
        this.#options.engine.processAsync(source.command).then(
          (processed) => this.#guard(() => this.#processed(source, processed, true)),
          (error: unknown) => this.#fail(error),
        );
        return;
      }
      this.#processed(source, this.#options.engine.process(source.command), false);
    } catch (error) {
      this.#fail(error);
    }
  }

  #processed(source: CommandSource, processed: Processed, wasAsync: boolean): void {
    if (this.#isDead) return;
    barrier('after-process');
    const { response, stored } = processed;
    if (response.length < HEADER_BYTES) throw new VtpmdError('engine', 'libtpms gave no response');
    this.#options.observe?.(source, source.command, response);
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

  #finish(source: CommandSource, response: Buffer, wasStored: boolean, mustPump: boolean): void {
    if (this.#isDead) return;
    if (wasStored) barrier('after-ack');
    source.answer(response);
    this.#current = undefined;
    if (this.#idleWaiters.length > 0) for (const resolve of this.#idleWaiters.splice(0)) resolve();
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

/** Commands that run before the event loop gets a turn. */
const PUMP_BUDGET = 64;
