import { once } from 'node:events';
import { setTimeout as delay } from 'node:timers/promises';
import type { MigrationHello } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import type { Doorkeeper } from './destination.js';

/** Milliseconds that a supervisor may take to come back to a manager that was away, and between two looks. */
const RETURN_MS = 3_000;
const STEP_MS = 50;

/** A question to the toolstack of this host, until it is answered. */
interface Question {
  readonly accept: () => void;
  readonly refuse: (error: ManagerError) => void;
}

/** Of this host. */
interface Toolstack {
  isThere(): boolean;
  announce(hello: MigrationHello): void;
}

/** Hands incoming vTPMs to the toolstack, which hears of them on the event stream and answers on the admin socket. */
export class EventDoorkeeper implements Doorkeeper {
  readonly #questions = new Map<string, Question>();

  constructor(private readonly toolstack: Toolstack) {}

  async check(): Promise<void> {
    // After a restart of the manager its supervisor is back in a moment.
    for (let waited = 0; waited < RETURN_MS; waited += STEP_MS) {
      if (this.toolstack.isThere()) return;
      await delay(STEP_MS, undefined, { ref: false });
    }
    throw new ManagerError(
      'no-toolstack',
      'no supervisor is connected to the manager of the destination: nobody there could run the vTPM. Start it there (vtpmctl up), then again',
    );
  }

  async ask(hello: MigrationHello, signal: AbortSignal): Promise<void> {
    const id = Buffer.from(hello.migrationId).toString('hex');
    const answered = new Promise<void>((accept, refuse) => {
      this.#questions.set(id, { accept, refuse });
    });
    try {
      this.toolstack.announce(hello);
      await Promise.race([answered, gone(signal)]);
    } finally {
      this.#questions.delete(id);
    }
  }

  isAsked(id: string): boolean {
    return this.#questions.has(id);
  }

  /** @throws ManagerError `unknown-migration` where nobody waits for an answer */
  accept(id: string): void {
    this.#question(id).accept();
  }

  /** @param reason for the source @throws ManagerError `unknown-migration` */
  refuse(id: string, reason: ManagerError): void {
    this.#question(id).refuse(reason);
  }

  #question(id: string): Question {
    const question = this.#questions.get(id);
    if (question) return question;
    throw new ManagerError(
      'unknown-migration',
      `no migration ${id.slice(0, 32)} waits for an answer; it has ended meanwhile`,
    );
  }
}

async function gone(signal: AbortSignal): Promise<never> {
  if (!signal.aborted) await once(signal, 'abort');
  throw new ManagerError('migration-aborted', 'the migration has ended');
}
