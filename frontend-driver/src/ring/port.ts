import { closeSync } from 'node:fs';
import { Socket } from 'node:net';
import { sendNow, socketPair, systemCalls } from '../system-calls.js';
import { RingMemory } from './memory.js';
import { FrontendPage, STATE } from './page.js';

const NOTE = Buffer.of(0);
/** Looks at the page, about a microsecond, before others have a turn on this processor: the backend may wait for it. */
const LOOKS = 256;

/**
 * An open ring. One command is on its way at a time. `onNote` is called from the event loop when the backend may have
 * changed the page, and `onEnd` when it has closed its end.
 */
export class RingPort {
  readonly #memory: RingMemory;
  readonly #page: FrontendPage;
  readonly #eventFd: number;
  readonly #event: Socket;
  /** What the backend gets: the memory, its end of the event channel. */
  readonly descriptors: readonly [number, number];
  onNote: () => void = () => {};
  onEnd: () => void = () => {};

  /** @throws FrontendError `internal` */
  constructor(pages: number) {
    this.#memory = new RingMemory(pages);
    this.#page = new FrontendPage(this.#memory.bytes);
    const [here, there] = socketPair();
    this.#eventFd = here;
    this.descriptors = [this.#memory.fd, there];
    this.#event = new Socket({ fd: here });
    this.#event.on('data', () => this.onNote());
    this.#event.on('error', () => {});
    this.#event.on('close', () => this.onEnd());
  }

  /** The backend has its descriptors. */
  passed(): void {
    this.#memory.passed();
    closeSync(this.descriptors[1]);
  }

  /** How long a command or an answer can be. */
  get room(): number {
    return this.#page.room;
  }

  submit(command: Uint8Array, locality: number): void {
    this.#page.submit(command, locality);
    this.#notify();
  }

  /** Asks the backend to give the command up: if it waits it does not run, and if it runs the TPM may end it early. */
  cancel(): void {
    if (this.#page.cancel()) this.#notify();
  }

  /** The backend is done with the command. */
  get isDone(): boolean {
    const { state } = this.#page;
    return state === STATE.FINISH || state === STATE.IDLE;
  }

  /** False where the backend has not looked at the command; one that is gone never will. */
  get isTaken(): boolean {
    return this.#page.isTaken;
  }

  /** Waits for that outside of the event loop. @returns whether it is done @param until on the clock of performance.now() */
  spin(until: number): boolean {
    do {
      for (let left = LOOKS; left > 0; left--) if (this.isDone) return true;
      systemCalls().schedYield();
    } while (performance.now() < until);
    return this.isDone;
  }

  /** A copy of the answer; undefined where the command was given up and did not run. @throws FrontendError `protocol` */
  takeAnswer(): Buffer | undefined {
    return this.#page.state === STATE.FINISH ? this.#page.answer() : undefined;
  }

  /** The backend sees that; a command on its way has its effect all the same. */
  close(): void {
    if (this.#event.destroyed) return;
    this.#event.destroy();
    this.#memory.release();
  }

  /** Where it cannot be sent the backend has bytes that it has not read. */
  #notify(): void {
    if (!this.#event.destroyed) sendNow(this.#eventFd, NOTE);
  }
}
