import { randomBytes } from 'node:crypto';
import { chmodSync, rmSync } from 'node:fs';
import { createServer, type Socket } from 'node:net';
import { setTimeout as delay } from 'node:timers/promises';
import { checkSocketPath, type Logger, type Paths, peerCredentials, socketFd } from 'vtpm-common';
import { ToolstackError, type ToolstackErrorCode } from '../../error.js';
import { isWithin } from '../is-within.js';
import type { Supervisor } from '../supervisor.js';
import type { Vtpm } from '../vtpm.js';
import { isTrusted } from './access.js';
import { Creations } from './creations.js';
import { lineOf } from './protocol.js';
import { DropinSession, MAX_VTPMS_OF_USER } from './session.js';

export interface DropinServerOptions {
  readonly supervisor: Supervisor;
  readonly paths: Paths;
  readonly log: Logger;
  /** Who is served. */
  readonly uids: ReadonlySet<number>;
}

/** Two for each command that runs. */
const MAX_CONNECTIONS = 4096;
/** Of each user but root and the supervisor's own. */
const MAX_CONNECTIONS_OF_USER = 2 * MAX_VTPMS_OF_USER;
/** To take the refusal. */
const REFUSED_LIMIT_MS = 1_000;
/** To go, when all is stopped. */
const CLOSE_LIMIT_MS = 5_000;
/** For the requests under way, before an upgrade. */
const HOLD_LIMIT_MS = 10_000;
/** That commands have to come back after the supervisor has become another program. They try all the time. */
const RETURN_LIMIT_MS = 20_000;

/**
 * The socket of the drop-in commands. It is apart from the API: who comes here may be another user, and gets no more than
 * to start the vTPMs whose tokens he shows, and to have new ones made.
 */
export class DropinServer {
  readonly #options: DropinServerOptions;
  readonly #server;
  readonly #sessions = new Map<string, DropinSession>();
  readonly #creations = new Creations();
  readonly #closing = new AbortController();
  #isHeld = false;

  private constructor(options: DropinServerOptions) {
    this.#options = options;
    this.#server = createServer({ pauseOnConnect: true }, (socket) => this.#accept(socket));
    this.#server.maxConnections = MAX_CONNECTIONS;
  }

  /** @param goesOn vTPMs may run already whose commands have yet to come back */
  static async open(options: DropinServerOptions, goesOn: boolean): Promise<DropinServer> {
    const server = new DropinServer(options);
    await server.#listen();
    if (goesOn) void server.#stopTheLeft();
    return server;
  }

  /**
   * From now on requests wait. Resolves when those under way are done.
   * @throws ToolstackError `busy` where one of them does not come to its end
   */
  async hold(): Promise<void> {
    this.#isHeld = true;
    const underWay = new Set(this.#sessions.values());
    const areDone = Promise.all(
      [...underWay].map((session) => session.hold().then(() => underWay.delete(session))),
    );
    if (await isWithin(areDone, HOLD_LIMIT_MS)) return;
    const uids = [...new Set([...underWay].map(({ uid }) => uid))].join(', ');
    throw new ToolstackError(
      'busy',
      `a request of swtpm or swtpm_setup (user ${uids}) is under way and does not come to its end; try again later`,
    );
  }

  release(): void {
    this.#isHeld = false;
    for (const session of this.#sessions.values()) session.release();
  }

  /** @param done when all vTPMs are stopped, and the commands know it */
  async close(done: Promise<void>): Promise<void> {
    this.#closing.abort();
    const closed = new Promise<void>((resolve) => this.#server.close(() => resolve()));
    rmSync(this.#options.paths.supervisor.dropinSocket, { force: true });
    await done;
    for (const session of this.#sessions.values()) session.end();
    if (await isWithin(closed, CLOSE_LIMIT_MS)) return;
    for (const session of this.#sessions.values()) session.cutOff();
    await closed;
  }

  #listen(): Promise<void> {
    const path = checkSocketPath(this.#options.paths.supervisor.dropinSocket);
    // This supervisor holds the lock of the directory, so what is there was left by one that is gone.
    rmSync(path, { force: true });
    return new Promise((resolve, reject) => {
      this.#server.once('error', reject);
      this.#server.listen(path, () => {
        this.#server.removeListener('error', reject);
        this.#server.on('error', (error) =>
          this.#options.log.warn({ reason: error.message }, 'a drop-in command was not accepted'),
        );
        // Who may connect is decided by uid, once it is known.
        chmodSync(path, isShared(this.#options.uids) ? 0o666 : 0o600);
        resolve();
      });
    });
  }

  #accept(socket: Socket): void {
    let uid: number;
    try {
      uid = peerCredentials(socketFd(socket)).uid;
    } catch {
      // Gone before it was looked at.
      socket.destroy();
      return;
    }
    if (!this.#options.uids.has(uid)) {
      const message = `user ${uid} may not use the drop-in commands of this host; add it to the setting dropin-users and restart vtpm-supervisord`;
      refuse(socket, 'not-permitted', message);
      return;
    }
    const others = [...this.#sessions.values()].filter((session) => session.uid === uid);
    if (others.length >= MAX_CONNECTIONS_OF_USER && !isTrusted(uid)) {
      const message = `user ${uid} has ${others.length} connections to the supervisor, and gets no more; end the commands swtpm that are not needed`;
      refuse(socket, 'busy', message);
      return;
    }
    const key = randomBytes(16).toString('hex');
    const session = new DropinSession(socket, uid, key, {
      ...this.#options,
      creations: this.#creations,
      lend: (to, from) => this.#lend(to, from),
    });
    this.#sessions.set(key, session);
    socket.once('close', () => this.#sessions.delete(key));
    if (this.#isHeld) void session.hold();
  }

  #lend(key: string, from: DropinSession): boolean {
    const to = this.#sessions.get(key);
    if (!to || to === from || to.uid !== from.uid) return false;
    from.lendTo(to);
    return true;
  }

  /** A command that was killed while the supervisor became another program does not come back: its TPM is powered off. */
  async #stopTheLeft(): Promise<void> {
    const { signal } = this.#closing;
    await delay(RETURN_LIMIT_MS, undefined, { signal }).catch(() => undefined);
    if (signal.aborted) return;
    for (const vtpm of this.#options.supervisor.all()) if (isLeft(vtpm)) this.#stop(vtpm);
  }

  #stop(vtpm: Vtpm): void {
    const { log } = this.#options;
    log.warn({ vtpm: vtpm.entry.name }, 'its swtpm did not come back after the upgrade; it is stopped');
    vtpm.stop().catch((error: Error) => {
      log.error({ vtpm: vtpm.entry.name, reason: error.message }, 'not stopped in order');
    });
  }
}

/** Whoever it is cannot keep the connection by not closing it. */
function refuse(socket: Socket, code: ToolstackErrorCode, message: string): void {
  const limit = setTimeout(() => socket.destroy(), REFUSED_LIMIT_MS);
  socket.on('error', () => undefined);
  socket.once('close', () => clearTimeout(limit));
  socket.write(lineOf({ type: 'error', code, message }));
  socket.destroySoon();
}

function isLeft(vtpm: Vtpm): boolean {
  return (
    vtpm.entry.dropin !== null && !vtpm.isAttended && vtpm.state !== 'stopped' && vtpm.state !== 'crashed'
  );
}

/** Whether anybody but root and the supervisor's own user comes. */
export function isShared(uids: ReadonlySet<number>): boolean {
  return [...uids].some((uid) => !isTrusted(uid));
}
