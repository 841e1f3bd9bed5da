import type { Socket } from 'node:net';

import type { SupervisorLink, VmmDoor } from './supervisor-link.js';

interface Client {
  readonly door: VmmDoor;
  readonly socket: Socket;
}

/**
 * Clients on their way to the vTPM. What was accepted waits here until the vTPM is on, and as long as the supervisor is away.
 * On the control channel there is one client at a time, as swtpm has it: the next one waits for the end of the one before.
 */
export class Clients {
  readonly #waiting: Client[] = [];
  /** Connections that were passed, by their numbers. */
  readonly #passed = new Map<number, VmmDoor>();
  /** Numbers whose end was heard before they were, or that are not of clients. */
  readonly #early = new Set<number>();
  readonly #gone: (door: VmmDoor) => void;
  #link: SupervisorLink | undefined;
  #isPassing = false;

  /** @param gone hears of the end of each connection that was passed */
  constructor(gone: (door: VmmDoor) => void) {
    this.#gone = gone;
  }

  add(door: VmmDoor, socket: Socket): void {
    // Nothing is read from it, so only a failure to close can be said.
    socket.on('error', () => undefined);
    this.#waiting.push({ door, socket });
    void this.#passAll();
  }

  /** From now on they go to the vTPM of this session. @param there connections that it has already */
  serve(link: SupervisorLink, there: readonly number[]): void {
    this.#link = link;
    for (const connection of [...this.#passed.keys()]) {
      if (!there.includes(connection)) this.disconnected(connection);
    }
    void this.#passAll();
  }

  /** The session is over. Those whose way was not confirmed take it again in the next one. */
  pause(): void {
    this.#link = undefined;
  }

  /** How many came through that door and have not gone: also one whose way was not heard to be confirmed yet. */
  count(door: VmmDoor): number {
    return this.#countPassed(door) + this.#waiting.filter((client) => client.door === door).length;
  }

  #countPassed(door: VmmDoor): number {
    return [...this.#passed.values()].filter((other) => other === door).length;
  }

  disconnected(connection: number): void {
    const door = this.#passed.get(connection);
    if (door === undefined) {
      this.#early.add(connection);
      return;
    }
    this.#passed.delete(connection);
    this.#gone(door);
    void this.#passAll();
  }

  async #passAll(): Promise<void> {
    if (this.#isPassing) return;
    this.#isPassing = true;
    for (let link = this.#link; link; link = this.#link) {
      const isControlFree = this.#countPassed('control') === 0;
      const next = this.#waiting.find(({ door }) => door !== 'control' || isControlFree);
      if (!next) break;
      try {
        const id = await link.pass(next.door, next.socket);
        this.#passed.set(id, next.door);
        this.#done(next);
        if (this.#early.delete(id)) this.disconnected(id);
      } catch {
        // Refused: it would be again. Where the session was lost, it takes its way in the next one.
        if (this.#link === link) this.#done(next);
      }
    }
    this.#isPassing = false;
  }

  /** Whoever has it now keeps it open. */
  #done(client: Client): void {
    this.#waiting.splice(this.#waiting.indexOf(client), 1);
    client.socket.destroy();
  }
}
