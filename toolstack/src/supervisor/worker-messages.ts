import type { Socket } from 'node:net';
import { LineReader, parseWorkerMessage, type WorkerMessage } from './control-protocol.js';

export interface MessageHandlers {
  take(message: WorkerMessage): void;
  /** It broke the protocol, and is not listened to any more. */
  broken(message: string): void;
}

/** In all for a burst, and per pause after it: 2,000 messages a second. */
const MAX_MESSAGES_AT_ONCE = 200;
const PAUSE_MS = 100;

/** What a worker says on its control channel. One that talks without end waits; the supervisor has others. */
export class WorkerMessages {
  readonly #control: Socket;
  readonly #lines: LineReader;
  #recent = 0;

  /** @param pending a line that was half read by the program before this one, base64 */
  constructor(control: Socket, pending: string | undefined, handlers: MessageHandlers) {
    this.#control = control;
    this.#lines = new LineReader(Buffer.from(pending ?? '', 'base64'));
    control.on('data', (chunk: Buffer) => {
      try {
        const lines = this.#lines.push(chunk);
        for (const line of lines) handlers.take(parseWorkerMessage(line));
        this.#slowDown(lines.length);
      } catch (error) {
        control.destroy();
        handlers.broken(`the worker broke the protocol: ${(error as Error).message}`);
      }
    });
    // A worker that ends closes it; what that means its end says.
    control.on('error', () => undefined);
  }

  /** The line that is half read, base64. */
  get pending(): string {
    return this.#lines.pending.toString('base64');
  }

  #slowDown(messages: number): void {
    this.#recent += messages;
    if (this.#recent < MAX_MESSAGES_AT_ONCE || this.#control.isPaused()) return;
    this.#control.pause();
    setTimeout(() => {
      this.#recent = 0;
      this.#control.resume();
    }, PAUSE_MS).unref();
  }
}
