import { connect, type Socket } from 'node:net';
import { setTimeout as delay } from 'node:timers/promises';
import { sendDescriptor, socketFd } from 'vtpm-common/libc';
import { LineReader } from '../supervisor/control-protocol.js';
import {
  DROPIN_FORMAT,
  type DropinMessage,
  type DropinRequest,
  lineOf,
  type PlacedToken,
  parseMessage,
} from '../supervisor/dropin/protocol.js';
import { DropinRefusal } from './refusal.js';

export type Done = Extract<DropinMessage, { type: 'ok' }>;
export type VmmDoor = Extract<DropinRequest, { type: 'connection' }>['door'];

export interface LinkEvents {
  /** A client that was passed is gone, or the data channel that one of them gave. */
  disconnected(connection: number, door: string): void;
  /** The vTPM is off. `reason`: why it crashed. */
  ended(reason: string | null): void;
  /** The supervisor is gone, or has become another program. */
  lost(): void;
}

/** The supervisor refused, in its own words. */
export class SupervisorRefusal extends DropinRefusal {
  constructor(
    readonly code: string,
    message: string,
  ) {
    super(message);
  }
}

/** The session is over. */
export class SupervisorLost extends DropinRefusal {
  constructor() {
    super('the vTPM supervisor went away; see why: journalctl -u vtpm-supervisord, or vtpmctl logs');
  }
}

interface Waiter {
  resolve(done: Done): void;
  reject(error: Error): void;
}

/** A supervisor that is being upgraded is away for less than a second; one that is started anew takes longer. */
const CONNECT_LIMIT_MS = 15_000;
const CONNECT_PAUSE_MS = 50;

/** A session with the supervisor: lines on one connection, descriptors on the other. */
export class SupervisorLink {
  readonly #lines: Socket;
  readonly #events: LinkEvents;
  readonly #reader = new LineReader();
  readonly #waiters: Waiter[] = [];
  readonly #session: Promise<string>;
  #greeted: { resolve(session: string): void; reject(error: Error): void } | undefined;
  #descriptors: SupervisorLink | undefined;
  #isOver = false;

  private constructor(lines: Socket, events: LinkEvents) {
    this.#lines = lines;
    this.#events = events;
    this.#session = new Promise((resolve, reject) => {
      this.#greeted = { resolve, reject };
    });
    this.#session.catch(() => undefined);
    lines.on('data', (chunk: Buffer) => this.#take(chunk));
    lines.on('error', () => undefined);
    lines.on('close', () => this.#over());
  }

  /** @param patience milliseconds that a supervisor may be away @throws DropinRefusal */
  static async open(path: string, events: LinkEvents, patience = 0): Promise<SupervisorLink> {
    const link = new SupervisorLink(await connectTo(path, patience), events);
    const session = await link.#session;
    const nobody = { disconnected: () => undefined, ended: () => undefined, lost: () => undefined };
    link.#descriptors = new SupervisorLink(await connectTo(path, 0), nobody);
    await link.#descriptors.#session;
    await link.#descriptors.request({ type: 'descriptors', session });
    return link;
  }

  /** @throws SupervisorRefusal, DropinRefusal where the supervisor is gone */
  request(request: DropinRequest): Promise<Done> {
    return new Promise((resolve, reject) => {
      if (this.#isOver) return reject(new SupervisorLost());
      this.#waiters.push({ resolve, reject });
      this.#lines.write(lineOf(request));
    });
  }

  start(token: PlacedToken, goesOn = false): Promise<Done> {
    return this.request({ type: 'start', token, goesOn });
  }

  /** Gives a client away: it stays the caller's, too, who closes it then. @returns the id of the connection */
  async pass(door: VmmDoor, client: Socket | number): Promise<number> {
    if (this.#isOver || !this.#descriptors) throw new SupervisorLost();
    sendDescriptor(
      socketFd(this.#descriptors.#lines),
      typeof client === 'number' ? client : socketFd(client),
    );
    const { connection } = await this.request({ type: 'connection', door });
    return connection ?? -1;
  }

  close(): void {
    this.#lines.destroy();
    this.#descriptors?.close();
  }

  #take(chunk: Buffer): void {
    try {
      for (const line of this.#reader.push(chunk)) this.#hear(parseMessage(line));
    } catch (error) {
      this.#greeted?.reject(
        new DropinRefusal(`the supervisor is another version (${(error as Error).message})`),
      );
      this.close();
    }
  }

  #hear(message: DropinMessage): void {
    switch (message.type) {
      case 'hello':
        if (message.format !== DROPIN_FORMAT) throw new Error(`it speaks format ${message.format}`);
        this.#greeted?.resolve(message.session);
        return;
      case 'ok':
        this.#waiters.shift()?.resolve(message);
        return;
      case 'error': {
        const refusal = new SupervisorRefusal(message.code, message.message);
        this.#greeted?.reject(refusal);
        this.#waiters.shift()?.reject(refusal);
        return;
      }
      case 'disconnected':
        this.#events.disconnected(message.connection, message.door);
        return;
      case 'ended':
        this.#events.ended(message.reason);
        return;
    }
  }

  #over(): void {
    if (this.#isOver) return;
    this.#isOver = true;
    this.#descriptors?.close();
    this.#greeted?.reject(new SupervisorLost());
    for (const waiter of this.#waiters.splice(0)) waiter.reject(new SupervisorLost());
    this.#events.lost();
  }
}

async function connectTo(path: string, patience: number): Promise<Socket> {
  const until = performance.now() + Math.min(patience, CONNECT_LIMIT_MS);
  for (;;) {
    try {
      return await connectOnce(path);
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException;
      if (performance.now() >= until) throw new DropinRefusal(whyNot(path, code));
    }
    await delay(CONNECT_PAUSE_MS);
  }
}

function connectOnce(path: string): Promise<Socket> {
  return new Promise((resolve, reject) => {
    const socket = connect({ path });
    socket.once('error', reject);
    socket.once('connect', () => {
      socket.removeListener('error', reject);
      resolve(socket);
    });
  });
}

function whyNot(path: string, code: string | undefined): string {
  if (code === 'EACCES' || code === 'EPERM') {
    return `user ${process.getuid?.()} may not reach ${path}; add it to the setting dropin-users and restart vtpm-supervisord`;
  }
  return `the vTPM supervisor is not running (${path}: ${code}); start it: systemctl start vtpm-supervisord, or vtpmctl up`;
}
