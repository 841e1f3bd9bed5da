import { closeSync } from 'node:fs';
import { Socket } from 'node:net';
import { type ManagerLink, openManagerLink } from '../manager-link/manager-link.js';

export interface IdleLinkEvents {
  lost(): void;
  /** Another one took the place of a lost one, and the manager has answered on it. */
  up(): void;
}

/**
 * The link of a worker that has no identity yet: there is nothing to do on it. It may be lost, and another take its
 * place, any number of times.
 */
export class IdleLink {
  readonly #events: IdleLinkEvents;
  #link: ManagerLink;
  #isTaken = false;

  constructor(fd: number, events: IdleLinkEvents) {
    this.#events = events;
    this.#link = this.#open(fd);
  }

  #open(fd: number): ManagerLink {
    const link = openManagerLink(new Socket({ fd }));
    void link.closed.then(() => {
      if (this.#isIdle(link)) this.#events.lost();
    });
    return link;
  }

  /** Who has taken it sees a loss himself, where he waits for an answer on it. */
  #isIdle(link: ManagerLink): boolean {
    return link === this.#link && !this.#isTaken;
  }

  replace(fd: number): void {
    if (this.#isTaken) {
      // The Load on the link before fails by itself, and the worker with it.
      closeSync(fd);
      return;
    }
    const link = this.#open(fd);
    this.#link.close();
    this.#link = link;
    void link.greeted.then(() => {
      if (this.#isIdle(link)) this.#events.up();
    });
  }

  /** For the identity, which there is only one of. */
  take(): ManagerLink {
    this.#isTaken = true;
    return this.#link;
  }
}
