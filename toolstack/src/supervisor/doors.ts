import { chmodSync, closeSync, renameSync, rmSync } from 'node:fs';
import { createServer, type Server, Socket } from 'node:net';
import { basename, dirname, join } from 'node:path';
import { checkSocketPath, passingDirectory, socketFd } from 'vtpm-common';
import { closeUnknown, isUnixStream } from 'vtpm-common/passed-descriptors';
import { ToolstackError } from '../error.js';
import type { DoorName } from './control-protocol.js';
import { applyAccess, type DoorAccess, directoryMode } from './door-access.js';
import { DoorClients } from './door-clients.js';
import { type DoorKind, doorFile, doorFiles, entrancesOf } from './door-kinds.js';
import type { InheritedDescriptors, KeptDescriptors } from './handover/descriptors.js';
import type { DoorsHandOver } from './handover/state.js';
import { listenOnPair } from './loopback.js';
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

/** Where the doors of a vTPM are, which ones, and for whom. */
export interface DoorPlan {
  readonly directory: string;
  readonly access: DoorAccess;
  readonly kinds: readonly DoorKind[];
}

/**
 * The sockets that a guest's side connects to. A connection is accepted here, its descriptor goes to the worker, and
 * the duplicate that stays here keeps it open should the worker end. Nothing is ever read from it here.
 */
export class Doors {
  readonly #servers = new Map<DoorName, Server>();
  readonly #connections = new Map<number, Visit>();
  readonly #clients: DoorClients;
  readonly #plan: DoorPlan;
  readonly #events: DoorEvents;
  #nextId: number;
  #isShown = false;

  private constructor(
    plan: DoorPlan,
    events: DoorEvents,
    before?: Pick<DoorsHandOver, 'nextId' | 'clients'>,
  ) {
    this.#clients = new DoorClients(before?.clients);
    this.#nextId = before?.nextId ?? 1;
    this.#plan = plan;
    this.#events = events;
  }

  /**
   * Makes them, where nobody finds them yet: `show`. There is time for it while a worker loads.
   * @throws ToolstackError `bad-request` where a path is too long, `internal` where a socket cannot be made
   */
  static async open(plan: DoorPlan, events: DoorEvents): Promise<Doors> {
    const doors = new Doors(plan, events);
    const { directory, access, kinds } = plan;
    try {
      chmodSync(passingDirectory(directory), directoryMode(access));
      const files = entrancesOf(kinds).filter((door) => doorFile(directory, door) !== undefined);
      await Promise.all(files.map((door) => doors.#listen(door)));
      if (kinds.includes('mssim')) {
        await listenOnPair(doors.#entrance('mssim'), doors.#entrance('mssim-platform'));
        for (const door of entrancesOf(['mssim'])) doors.#servers.get(door)?.on('error', () => undefined);
      }
      return doors;
    } catch (error) {
      doors.close();
      throw ToolstackError.from(error, `the sockets in ${directory} cannot be made`);
    }
  }

  /** The port of the command door of `mssim`; its platform door is at the next one. Undefined where it has none. */
  get mssimPort(): number | undefined {
    const address = this.#servers.get('mssim')?.address();
    return typeof address === 'object' ? address?.port : undefined;
  }

  /** From now on somebody may come in. @throws ToolstackError `internal` */
  show(): void {
    const { directory, kinds } = this.#plan;
    try {
      for (const door of entrancesOf(kinds)) {
        const path = doorFile(directory, door);
        if (path !== undefined) renameSync(hidden(path), path);
      }
      this.#isShown = true;
    } catch (error) {
      throw ToolstackError.from(error, `the sockets in ${directory} cannot be made`);
    }
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
    doors.#isShown = true;
    try {
      // The connections first: whoever comes in next gets another id.
      for (const { id, door, peer, fd } of before.connections) {
        doors.#keep({ id, door, peer: peer ?? undefined, socket: holdOpen(inherited.takeSocket(fd)) });
      }
      for (const door of entrancesOf(plan.kinds)) {
        const fd = before.servers[door];
        if (fd === undefined) throw new ToolstackError('corrupt', `the hand-over has no door "${door}"`);
        doors.#listenOn(door, inherited.takeSocket(fd));
      }
      return doors;
    } catch (error) {
      doors.close();
      throw error;
    }
  }

  /** What the next program needs to know of them. */
  handOver(kept: KeptDescriptors): DoorsHandOver {
    const entrances = [...this.#servers].map(([door, server]) => [door, kept.keep(socketFd(server))]);
    return {
      nextId: this.#nextId,
      servers: Object.fromEntries(entrances) as DoorsHandOver['servers'],
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
    for (const server of this.#servers.values()) server.close();
    this.#servers.clear();
    // A closed server removes the socket that it made itself, and no other.
    for (const path of doorFiles(this.#plan.directory)) rmSync(path, { force: true });
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

  #listen(door: DoorName): Promise<void> {
    const path = hidden(checkSocketPath(this.#file(door)));
    // This supervisor holds the lock, so what is there was left by one that is gone.
    rmSync(path, { force: true });
    const server = this.#entrance(door);
    return new Promise((resolve, reject) => {
      server.once('error', reject);
      server.listen(path, () => {
        server.removeListener('error', reject);
        server.on('error', () => undefined);
        try {
          applyAccess(path, this.#plan.access);
          resolve();
        } catch (error) {
          reject(error);
        }
      });
    });
  }

  /** At once: nobody comes in before the caller has everything in place. */
  #listenOn(door: DoorName, fd: number): void {
    const server = this.#entrance(door).on('error', () => undefined);
    server.listen({ fd });
    if (!server.listening) {
      throw new ToolstackError(
        'corrupt',
        `descriptor ${fd} of the hand-over does not listen at the door "${door}"`,
      );
    }
  }

  #file(door: DoorName): string {
    const path = doorFile(this.#plan.directory, door);
    if (path === undefined) throw new ToolstackError('internal', `the door "${door}" is no unix socket`);
    return path;
  }

  #entrance(door: DoorName): Server {
    const server = createServer({ pauseOnConnect: true, allowHalfOpen: true }, (socket) =>
      this.#accept(door, socket),
    );
    this.#servers.set(door, server);
    return server;
  }

  #accept(door: DoorName, socket: Socket): void {
    this.#bringIn(door, socket);
  }

  /** @returns undefined where it was turned away */
  #bringIn(door: DoorName, socket: Socket): number | undefined {
    // Counted here: a server counts only what it accepted itself, and some came to the program before this one.
    const isFull = this.visits().filter((visit) => visit.door === door).length >= MAX_CONNECTIONS;
    if (!this.#isShown || isFull || !this.#mayEnter(door, socket)) {
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

/** Not longer than the path itself, which may be as long as a socket's can be. */
function hidden(path: string): string {
  return join(dirname(path), `.${basename(path).slice(1)}`);
}
