import { closeSync, rmSync } from 'node:fs';
import { Socket } from 'node:net';
import { socketFd } from 'vtpm-common';
import { closeUnknown, isUnixStream } from 'vtpm-common/passed-descriptors';
import { ToolstackError } from '../error.js';
import type { DoorName } from './control-protocol.js';
import { DoorClients } from './door-clients.js';
import { doorFile } from './door-kinds.js';
import { type DoorPlan, Entrances } from './entrances.js';
import type { InheritedDescriptors, KeptDescriptors } from './handover/descriptors.js';
import type { DoorsHandOver } from './handover/state.js';
import { peerUid } from './peer-uid.js';

/** More at one door are closed as they come: a client that leaks connections must not exhaust the host. */
const MAX_CONNECTIONS = 64;

/** One connection. */
export interface Visit {
  readonly door: DoorName;
  readonly id: number;
  /** The client's process, undefined where it cannot be known. */
  readonly peer: number | undefined;
  readonly socket: Socket;
}

/** What the worker is told of the connections it gets. */
export interface DoorEvents {
  /** Where it throws, the connection is closed. */
  connected(visit: Visit): void;
  /** A connection is over, whoever ended it. */
  disconnected(visit: Visit): void;
  /** The process of former connections has ended. */
  peerGone(peer: number): void;
}

/**
 * The sockets that a guest's side connects to. A connection is accepted here, its descriptor goes to the worker, and
 * the duplicate that stays here keeps it open should the worker end. Nothing is ever read from it here.
 */
export class Doors {
  readonly #entrances: Entrances;
  readonly #connections = new Map<number, Visit>();
  readonly #clients: DoorClients;
  readonly #plan: DoorPlan;
  readonly #events: DoorEvents;
  #nextId: number;

  private constructor(
    plan: DoorPlan,
    events: DoorEvents,
    before?: Pick<DoorsHandOver, 'nextId' | 'clients'>,
  ) {
    this.#clients = new DoorClients(before?.clients);
    this.#nextId = before?.nextId ?? 1;
    this.#plan = plan;
    this.#events = events;
    this.#entrances = new Entrances(plan, (door, socket) => void this.#bringIn(door, socket));
  }

  /**
   * Makes them, where nobody finds them yet: `show`. There is time for it while a worker loads.
   * @throws ToolstackError `bad-request` where a path is too long, `internal` where a socket cannot be made
   */
  static async open(plan: DoorPlan, events: DoorEvents): Promise<Doors> {
    const doors = new Doors(plan, events);
    try {
      await doors.#entrances.open();
      return doors;
    } catch (error) {
      doors.close();
      throw ToolstackError.from(error, `the sockets in ${plan.directory} cannot be made`);
    }
  }

  /** The port of the command door of `mssim`; its platform door is at the next one. Undefined where it has none. */
  get mssimPort(): number | undefined {
    return this.#entrances.mssimPort;
  }

  /** From now on somebody may come in. @throws ToolstackError `internal` */
  show(): void {
    this.#entrances.show();
  }

  /** Those that are open, in the order in which they came. */
  visits(): Visit[] {
    return [...this.#connections.values()];
  }

  /** The doors of the program before this one, with those who stand in them. @throws ToolstackError `corrupt` */
  static adopt(
    plan: DoorPlan,
    events: DoorEvents,
    before: DoorsHandOver,
    inherited: InheritedDescriptors,
  ): Doors {
    const doors = new Doors(plan, events, before);
    try {
      // The connections first: whoever comes in next gets another id.
      for (const { id, door, peer, fd } of before.connections) {
        doors.#keep({ id, door, peer: peer ?? undefined, socket: holdOpen(inherited.takeSocket(fd)) });
      }
      doors.#entrances.adopt(before.servers, inherited);
      return doors;
    } catch (error) {
      doors.close();
      throw error;
    }
  }

  /** What the next program needs to know of them. */
  handOver(kept: KeptDescriptors): DoorsHandOver {
    return {
      nextId: this.#nextId,
      servers: this.#entrances.handOver(kept),
      connections: this.visits()
        .filter(({ socket }) => !socket.destroyed)
        .map(({ id, door, peer, socket }) => ({
          id,
          door,
          peer: peer ?? null,
          fd: kept.keep(socketFd(socket)),
        })),
      clients: this.#clients.all(),
    };
  }

  /**
   * A connection that somebody else accepted.
   * @param fd its descriptor, which is closed with it, also where this throws
   * @returns its id @throws ToolstackError `busy` where there are too many, `bad-request` for no stream socket
   */
  admit(door: DoorName, fd: number): number {
    let socket: Socket;
    try {
      socket = holdOpen(fd);
    } catch (error) {
      const message = 'what was passed as a connection is no stream socket';
      throw new ToolstackError('bad-request', message, { cause: error });
    }
    const id = this.#bringIn(door, socket);
    if (id === undefined)
      throw new ToolstackError('busy', `there are ${MAX_CONNECTIONS} connections at the door "${door}"`);
    return id;
  }

  /** The worker has closed its end. */
  forget(id: number): void {
    const visit = this.#connections.get(id);
    if (!visit) return;
    visit.socket.destroy();
    this.#connections.delete(id);
    this.#events.disconnected(visit);
  }

  /**
   * The data channel of a VMM, which a worker was given: from now on it outlives the worker.
   * @param fd is closed where it is not kept @returns undefined where there is one already, or it is no unix stream socket
   */
  keepDataChannel(fd: number): Visit | undefined {
    const isWanted =
      this.#plan.kinds.includes('control') && !this.visits().some(({ door }) => door === 'vmm-data');
    if (!isWanted || !isUnixStream(fd)) {
      closeUnknown(fd);
      return undefined;
    }
    const visit: Visit = { door: 'vmm-data', id: this.#nextId++, peer: undefined, socket: holdOpen(fd) };
    this.#keep(visit);
    return visit;
  }

  /** No new connections; those that are there stay. */
  closeEntrances(): void {
    this.#entrances.close();
  }

  close(): void {
    this.closeEntrances();
    for (const id of [...this.#connections.keys()]) this.forget(id);
    rmSync(this.#plan.directory, { recursive: true, force: true });
  }

  /** The dead first: what they left makes room for the new one. */
  lookForGone(): void {
    for (const peer of this.#clients.takeGone()) this.#events.peerGone(peer);
  }

  /** @returns undefined where it was turned away */
  #bringIn(door: DoorName, socket: Socket): number | undefined {
    // Counted here: a server counts only what it accepted itself, and some came to the program before this one.
    const isFull = this.visits().filter((visit) => visit.door === door).length >= MAX_CONNECTIONS;
    if (!this.#entrances.isShown || isFull || !this.#mayEnter(door, socket)) {
      socket.destroy();
      return undefined;
    }
    const id = this.#nextId++;
    try {
      this.lookForGone();
      const visit = { door, id, peer: this.#clients.add(socket), socket };
      this.#keep(visit);
      this.#events.connected(visit);
      return id;
    } catch {
      socket.destroy();
      this.forget(id);
      return undefined;
    }
  }

  /** Of unix sockets the kernel has made sure. */
  #mayEnter(door: DoorName, socket: Socket): boolean {
    if (doorFile(this.#plan.directory, door) !== undefined) return true;
    const uid = peerUid(socket);
    return uid === 0 || uid === (this.#plan.access.owner?.uid ?? process.getuid?.());
  }

  #keep(visit: Visit): void {
    this.#connections.set(visit.id, visit);
    visit.socket.on('error', () => this.forget(visit.id));
  }
}

/** A connection that is never read from here. @param fd is closed with it, also where this throws @throws Error for no stream socket */
function holdOpen(fd: number): Socket {
  try {
    return new Socket({ fd, readable: false, writable: true, allowHalfOpen: true });
  } catch (error) {
    closeSync(fd);
    throw error;
  }
}
