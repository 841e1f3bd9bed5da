import { setTimeout as delay } from 'node:timers/promises';
import type { Logger } from 'vtpm-common';
import type { AdminClient } from './admin-client.js';
import type { ManagerEvent } from './migration/desk.js';

const FIRST_RETRY_MS = 100;
const LONGEST_RETRY_MS = 2_000;
/** The manager sends a heartbeat every 10 s. */
const SILENCE_MS = 30_000;
/** Nobody here waits for the others, and each Save is one. */
const TYPES = ['fenced', 'incoming', 'migration'];

/** Who has something to do when the manager comes, or says something. */
export interface ManagerListener {
  look(): Promise<void>;
  hear(event: ManagerEvent): void;
}

/** Follows the manager's event stream for as long as the supervisor runs, through every restart of the manager. */
export class ManagerEvents {
  readonly #admin: AdminClient;
  readonly #log: Logger;
  readonly #stop = new AbortController();
  readonly #running: Promise<void>;
  #isConnected = false;
  #connections = 0;
  #listener: ManagerListener | undefined;

  constructor(admin: AdminClient, log: Logger) {
    this.#admin = admin;
    this.#log = log;
    this.#running = this.#follow();
  }

  /** It looks at once where the manager is there. */
  listen(listener: ManagerListener): void {
    this.#listener = listener;
    if (this.#isConnected) void listener.look();
  }

  get isConnected(): boolean {
    return this.#isConnected;
  }

  /** Another number for each connection to a manager; undefined while there is none. */
  get instance(): number | undefined {
    return this.#isConnected ? this.#connections : undefined;
  }

  async close(): Promise<void> {
    this.#stop.abort();
    await this.#running;
  }

  async #follow(): Promise<void> {
    let wait = FIRST_RETRY_MS;
    while (!this.#stop.signal.aborted) {
      try {
        await this.#readStream(() => {
          wait = FIRST_RETRY_MS;
        });
      } catch (error) {
        this.#log.debug({ reason: (error as Error).message }, 'no event stream from the manager');
      }
      if (this.#isConnected && !this.#stop.signal.aborted) this.#log.warn('the manager is away');
      this.#isConnected = false;
      await delay(wait, undefined, { signal: this.#stop.signal }).catch(() => undefined);
      wait = Math.min(wait * 2, LONGEST_RETRY_MS);
    }
  }

  async #readStream(onConnected: () => void): Promise<void> {
    const attempt = new AbortController();
    const end = (): void => attempt.abort();
    const silence = setTimeout(end, SILENCE_MS);
    this.#stop.signal.addEventListener('abort', end);
    try {
      const stream = await this.#admin.events(TYPES, attempt.signal);
      if (stream.statusCode !== 200) throw new Error(`HTTP status ${stream.statusCode}`);
      let pending = '';
      for await (const chunk of stream.setEncoding('utf8') as AsyncIterable<string>) {
        silence.refresh();
        const lines = (pending + chunk).split('\n');
        pending = (lines.pop() ?? '').slice(-4096);
        for (const line of lines) this.#take(line, onConnected);
      }
    } finally {
      clearTimeout(silence);
      this.#stop.signal.removeEventListener('abort', end);
      attempt.abort();
    }
  }

  #take(line: string, onConnected: () => void): void {
    const event = JSON.parse(line) as ManagerEvent & { epoch?: unknown };
    if (event.type === 'hello') {
      this.#isConnected = true;
      this.#connections++;
      onConnected();
      this.#log.info('the manager is there');
      void this.#listener?.look();
    } else if (event.type === 'fenced') {
      this.#log.warn({ vtpm: event.id, epoch: event.epoch }, 'the manager fenced a worker');
    } else if (event.type === 'incoming' || event.type === 'migration') {
      this.#listener?.hear(event);
    }
  }
}
