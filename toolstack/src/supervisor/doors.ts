import { chmodSync, rmSync } from 'node:fs';
import { createServer, type Server, type Socket } from 'node:net';
import { join } from 'node:path';
import { checkSocketPath, passingDirectory } from 'vtpm-common';
import { ToolstackError } from '../error.js';
import type { DoorName } from './control-protocol.js';
import { applyAccess, type DoorAccess, directoryMode } from './door-access.js';
import { DoorClients } from './door-clients.js';

const FILES: Readonly<Record<DoorName, string>> = {
  tpm: 'tpm.sock',
  tcti: 'tcti.sock',
  'tcti-ctrl': 'tcti.sock.ctrl',
};

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
  /** The process of former connections has ended. */
  peerGone(peer: number): void;
}

export interface DoorPaths {
  readonly tpm: string;
  readonly tcti: string;
}

export function doorPaths(directory: string): DoorPaths {
  return { tpm: join(directory, FILES.tpm), tcti: join(directory, FILES.tcti) };
}

/**
 * The sockets that a guest's side connects to. A connection is accepted here, its descriptor goes to the worker, and
 * the duplicate that stays here keeps it open should the worker end. Nothing is ever read from it here.
 */
export class Doors {
  readonly #servers: Server[] = [];
  readonly #connections = new Map<number, Visit>();
  readonly #directory: string;
  readonly #clients = new DoorClients();
  readonly #access: DoorAccess;
  readonly #events: DoorEvents;
  #nextId = 1;

  private constructor(directory: string, access: DoorAccess, events: DoorEvents) {
    this.#directory = directory;
    this.#access = access;
    this.#events = events;
  }

  /** @throws ToolstackError `bad-request` where a path is too long, `internal` where a socket cannot be made */
  static async open(directory: string, access: DoorAccess, events: DoorEvents): Promise<Doors> {
    const doors = new Doors(directory, access, events);
    try {
      chmodSync(passingDirectory(directory), directoryMode(access));
      await Promise.all((Object.keys(FILES) as DoorName[]).map((door) => doors.#listen(door)));
      return doors;
    } catch (error) {
      doors.close();
      throw ToolstackError.from(error, `the sockets in ${directory} cannot be made`);
    }
  }

  /** Those that are open, in the order in which they came. */
  visits(): Visit[] {
    return [...this.#connections.values()];
  }

  /** The worker has closed its end. */
  forget(id: number): void {
    this.#connections.get(id)?.socket.destroy();
    this.#connections.delete(id);
  }

  /** No new connections; those that are there stay. */
  closeEntrances(): void {
    for (const server of this.#servers.splice(0)) server.close();
    // A closed server removes its socket itself, but not one that was left by a supervisor that was killed.
    for (const file of Object.values(FILES)) rmSync(join(this.#directory, file), { force: true });
  }

  close(): void {
    this.closeEntrances();
    for (const id of [...this.#connections.keys()]) this.forget(id);
    rmSync(this.#directory, { recursive: true, force: true });
  }

  /** The dead first: what they left makes room for the new one. */
  lookForGone(): void {
    for (const peer of this.#clients.takeGone()) this.#events.peerGone(peer);
  }

  #listen(door: DoorName): Promise<void> {
    const path = checkSocketPath(join(this.#directory, FILES[door]));
    // This supervisor holds the lock, so what is there was left by one that is gone.
    rmSync(path, { force: true });
    const server = createServer({ pauseOnConnect: true, allowHalfOpen: true }, (socket) =>
      this.#accept(door, socket),
    );
    server.maxConnections = MAX_CONNECTIONS;
    this.#servers.push(server);
    return new Promise((resolve, reject) => {
      server.once('error', reject);
      server.listen(path, () => {
        server.removeListener('error', reject);
        server.on('error', () => undefined);
        try {
          applyAccess(path, this.#access);
          resolve();
        } catch (error) {
          reject(error);
        }
      });
    });
  }

  #accept(door: DoorName, socket: Socket): void {
    const id = this.#nextId++;
    socket.on('error', () => this.forget(id));
    try {
      this.lookForGone();
      const visit = { door, id, peer: this.#clients.add(socket), socket };
      this.#connections.set(id, visit);
      this.#events.connected(visit);
    } catch {
      socket.destroy();
      this.forget(id);
    }
  }
}
