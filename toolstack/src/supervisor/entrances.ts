import { chmodSync, renameSync, rmSync } from 'node:fs';
import { createServer, type Server, type Socket } from 'node:net';
import { basename, dirname, join } from 'node:path';
import { checkSocketPath, passingDirectory, socketFd } from 'vtpm-common';
import { ToolstackError } from '../error.js';
import type { DoorName } from './control-protocol.js';
import { applyAccess, type DoorAccess, directoryMode } from './door-access.js';
import { type DoorKind, doorFile, doorFiles, entrancesOf } from './door-kinds.js';
import type { InheritedDescriptors, KeptDescriptors } from './handover/descriptors.js';
import type { DoorsHandOver } from './handover/state.js';
import { listenOnPair } from './loopback.js';

/** Where the doors of a vTPM are, which ones, and for whom. */
export interface DoorPlan {
  readonly directory: string;
  readonly access: DoorAccess;
  readonly kinds: readonly DoorKind[];
}

/** The sockets that listen at the doors of a vTPM. */
export class Entrances {
  readonly #servers = new Map<DoorName, Server>();
  readonly #plan: DoorPlan;
  readonly #come: (door: DoorName, socket: Socket) => void;
  #isShown = false;

  /** @param come somebody came in, and nothing was read yet */
  constructor(plan: DoorPlan, come: (door: DoorName, socket: Socket) => void) {
    this.#plan = plan;
    this.#come = come;
  }

  /** Makes them, where nobody finds them yet. @throws ToolstackError, Error; the caller closes them */
  async open(): Promise<void> {
    const { directory, access, kinds } = this.#plan;
    chmodSync(passingDirectory(directory), directoryMode(access));
    const files = entrancesOf(kinds).filter((door) => doorFile(directory, door) !== undefined);
    await Promise.all(files.map((door) => this.#listen(door)));
    if (kinds.includes('mssim')) {
      await listenOnPair(this.#entrance('mssim'), this.#entrance('mssim-platform'));
      for (const door of entrancesOf(['mssim'])) this.#servers.get(door)?.on('error', () => undefined);
    }
  }

  /** Those of the program before this one. @throws ToolstackError `corrupt`; the caller closes them */
  adopt(servers: DoorsHandOver['servers'], inherited: InheritedDescriptors): void {
    this.#isShown = true;
    for (const door of entrancesOf(this.#plan.kinds)) {
      const fd = servers[door];
      if (fd === undefined) throw new ToolstackError('corrupt', `the hand-over has no door "${door}"`);
      this.#listenOn(door, inherited.takeSocket(fd));
    }
  }

  /** What the next program needs to know of them. */
  handOver(kept: KeptDescriptors): DoorsHandOver['servers'] {
    const entrances = [...this.#servers].map(([door, server]) => [door, kept.keep(socketFd(server))]);
    return Object.fromEntries(entrances) as DoorsHandOver['servers'];
  }

  /** Of the command door of `mssim`; its platform door is at the next one. Undefined where it has none. */
  get mssimPort(): number | undefined {
    const address = this.#servers.get('mssim')?.address();
    return typeof address === 'object' ? address?.port : undefined;
  }

  get isShown(): boolean {
    return this.#isShown;
  }

  /** From now on they are found. @throws ToolstackError `internal` */
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

  close(): void {
    for (const server of this.#servers.values()) server.close();
    this.#servers.clear();
    // A closed server removes the socket that it made itself, and no other.
    for (const path of doorFiles(this.#plan.directory)) rmSync(path, { force: true });
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
      this.#come(door, socket),
    );
    this.#servers.set(door, server);
    return server;
  }
}

/** Not longer than the path itself, which may be as long as a socket's can be. */
function hidden(path: string): string {
  return join(dirname(path), `.${basename(path).slice(1)}`);
}
