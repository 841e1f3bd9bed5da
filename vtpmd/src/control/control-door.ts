import { closeSync } from 'node:fs';
import { barrier } from 'vtpm-common/barrier';
import type { AnswerNumbers, AnswerPipe } from '../checkpoint/answer-pipe.js';
import { VtpmdError } from '../error.js';
import { resultOf as resultOfBlob } from '../state-blob/result.js';
import type { Log } from '../worker/log.js';
import type { KeepSave, Step } from '../worker/power-switch.js';
import type { Actions, Outcome } from './actions.js';
import { type Asker, ControlConnection } from './control-connection.js';
import type { DataChannel } from './data-channel.js';
import { type ControlRequest, response } from './request.js';
import { ControlRefusal, RESULT } from './results.js';

export interface ControlDoorParts {
  readonly actions: Actions;
  readonly isOn: () => boolean;
  /** As PowerSwitch.perform. */
  perform(step: Step): Promise<void>;
  readonly data: DataChannel;
  readonly pipe: AnswerPipe;
  readonly numbers: AnswerNumbers;
  readonly notes: { torn: number };
  readonly log: Log;
  /** The VMM came, or is gone. */
  changed(): void;
  /** The VMM is gone. */
  left(): void;
  /** It has its answer to SHUTDOWN. */
  shutDown(): void;
  /** It must not go on. */
  failed(error: unknown): void;
}

/** Refusals of one VMM that are worth a line each. */
const MOST_LOGGED = 50;

/**
 * Where a VMM says what is to become of the TPM. One at a time: another one is refused while the first is there, because
 * each would pull the plug on the other. A VMM that goes leaves the TPM as it is: on, if it was (swtpm's tools connect for
 * each command).
 */
export class ControlDoor {
  readonly #parts: ControlDoorParts;
  #connection: ControlConnection | undefined;
  /** Of the VMM that is there. */
  #refusals = 0;

  constructor(parts: ControlDoorParts) {
    this.#parts = parts;
  }

  get isConnected(): boolean {
    return this.#connection !== undefined;
  }

  open(id: number, fd: number, onClosed: () => void): void {
    // Its end may not have come through the event loop yet.
    if (this.#connection?.hasLeft) this.#connection.close();
    if (this.#connection) {
      this.#parts.log('warn', 'a second VMM was refused: one is connected', { id });
      closeSync(fd);
      onClosed();
      return;
    }
    const { pipe, numbers, notes } = this.#parts;
    const connection = new ControlConnection(fd, {
      ...{ id, pipe, numbers, notes },
      serve: (request, asker) => this.#serve(request, asker),
      onClosed: () => {
        this.#connection = undefined;
        this.#parts.data.close();
        this.#parts.left();
        this.#parts.changed();
        onClosed();
      },
    });
    this.#connection = connection;
    this.#refusals = 0;
    this.#parts.changed();
    connection.start();
  }

  /** As ControlConnection.release. */
  release(): void {
    this.#connection?.release();
  }

  #serve(request: ControlRequest, asker: Asker): void {
    const { shape } = request;
    if (shape.turn === 'at-once') {
      this.#act(request, asker, NOTHING_TO_KEEP).then(
        (outcome) => this.#answer(request, asker, outcome),
        (error: unknown) => this.#refuse(request, asker, error),
      );
      return;
    }
    let outcome: Outcome | undefined;
    const step: Step = {
      run: async (keepSave) => {
        outcome = await this.#act(request, asker, keepSave);
        return outcome.stored;
      },
      // Where it is asked for before there is an outcome, a save of the request's own is what makes it done.
      answered: () => {
        const { isOnce, ...done } = outcome ?? { result: RESULT.Success, isOnce: true };
        return isOnce ? asker.answered(responseTo(request, done)) : undefined;
      },
      done: () => outcome && this.#answer(request, asker, outcome),
    };
    this.#parts.perform(step).catch((error: unknown) => this.#refuse(request, asker, error));
  }

  async #act(request: ControlRequest, asker: Asker, keepSave: KeepSave): Promise<Outcome> {
    const { needs, name } = request.shape;
    const isOn = this.#parts.isOn();
    if ((needs === 'on' && !isOn) || (needs === 'off' && isOn)) {
      throw new ControlRefusal(RESULT.BadOrdinal, `${name} while the TPM is ${isOn ? 'on' : 'off'}`);
    }
    barrier('control-before-act');
    const outcome = await this.#parts.actions[name](request, asker, keepSave);
    barrier('control-after-act');
    return outcome;
  }

  #answer(request: ControlRequest, asker: Asker, outcome: Outcome): void {
    try {
      const answer = responseTo(request, outcome);
      asker.answer(answer);
      // A blob may be the state itself.
      answer.fill(0);
      this.#parts.changed();
      if (request.shape.name === 'SHUTDOWN' && outcome.result === RESULT.Success) this.#parts.shutDown();
    } catch (error) {
      this.#parts.failed(error);
    }
  }

  #refuse(request: ControlRequest, asker: Asker, error: unknown): void {
    const result = resultOf(error);
    if (result === undefined) {
      this.#parts.failed(error);
      return;
    }
    const { name } = request.shape;
    this.#refusals++;
    if (this.#refusals <= MOST_LOGGED) {
      const more = this.#refusals === MOST_LOGGED ? '; what else this VMM is refused is not logged' : '';
      this.#parts.log('warn', `${name} was refused: ${(error as Error).message}${more}`, { result });
    }
    this.#answer(request, asker, { result });
  }
}

const NOTHING_TO_KEEP: KeepSave = () => {};

function responseTo({ shape }: ControlRequest, { result, words = [], content }: Outcome): Buffer {
  const head = response(shape, result, ...words);
  return content ? Buffer.concat([head, content]) : head;
}

/** @returns undefined where the worker must not go on */
function resultOf(error: unknown): number | undefined {
  if (error instanceof ControlRefusal) return error.result;
  if (!(error instanceof VtpmdError)) return undefined;
  return resultOfBlob(error);
}
