import { once } from 'node:events';
import { closeSync, writeSync } from 'node:fs';
import type { Socket } from 'node:net';
import { duplicate, type Logger, type Paths, receiveDescriptor, socketFd } from 'vtpm-common';
import { closeUnknown, isSocket } from 'vtpm-common/passed-descriptors';
import { ToolstackError } from '../../error.js';
import { type DoorName, LineReader } from '../control-protocol.js';
import { ShapeError } from '../handover/shape.js';
import type { Supervisor } from '../supervisor.js';
import type { Vtpm } from '../vtpm.js';
import type { Attendant } from '../vtpm-status.js';
import { checkToken, isTrusted } from './access.js';
import { createVtpm, deleteVtpm } from './creation.js';
import type { Creations } from './creations.js';
import {
  DROPIN_FORMAT,
  type DropinMessage,
  type DropinRequest,
  lineOf,
  type PlacedToken,
  parseRequest,
} from './protocol.js';

export interface SessionContext {
  readonly supervisor: Supervisor;
  readonly paths: Paths;
  readonly log: Logger;
  readonly creations: Creations;
  /** Makes `socket` the connection for descriptors of that session. @returns false where there is none */
  lend(session: string, from: DropinSession): boolean;
}

type Done = Partial<Omit<Extract<DropinMessage, { type: 'ok' }>, 'type'>>;

const OK: Extract<DropinMessage, { type: 'ok' }> = {
  type: 'ok',
  name: null,
  state: null,
  connection: null,
  connections: [],
};

/** The commands wait for each answer. */
const MAX_WAITING = 16;
/** Of each user, but root and the supervisor's own. */
export const MAX_VTPMS_OF_USER = 256;

/** One drop-in command that is connected: its vTPM is on while it is. */
export class DropinSession implements Attendant {
  readonly #context: SessionContext;
  readonly #socket: Socket;
  readonly #reader = new LineReader();
  /** Of the process at the other end. */
  readonly uid: number;
  /** Of the connection that descriptors come on. */
  #descriptors: number | undefined;
  #vtpm: Vtpm | undefined;
  /** Id of the vTPM that it made. */
  #made: string | undefined;
  /** Requests that came before the one under way was answered. */
  readonly #waiting: DropinRequest[] = [];
  #isWorking = false;
  #isHeld = false;
  /** The request under way. */
  #current: Promise<void> = Promise.resolve();

  constructor(socket: Socket, uid: number, key: string, context: SessionContext) {
    this.#socket = socket;
    this.uid = uid;
    this.#context = context;
    socket.on('data', (chunk: Buffer) => this.#take(chunk));
    socket.on('error', () => undefined);
    socket.on('close', () => this.#left());
    this.#send({ type: 'hello', format: DROPIN_FORMAT, session: key });
    socket.resume();
  }

  /** Begins no more requests. Resolves when the one under way is done. */
  async hold(): Promise<void> {
    this.#isHeld = true;
    this.#socket.pause();
    await this.#current;
  }

  release(): void {
    this.#isHeld = false;
    void this.#work();
  }

  /** This connection becomes the one for descriptors of that session, and nothing else reads it any more. */
  lendTo(session: DropinSession): void {
    const descriptors = duplicate(socketFd(this.#socket));
    // A socket that is only paused goes on reading ahead.
    this.#socket.destroy();
    session.#forgetDescriptors();
    session.#descriptors = descriptors;
    writeSync(descriptors, lineOf(OK));
  }

  end(): void {
    this.#socket.end();
  }

  cutOff(): void {
    this.#socket.destroy();
  }

  disconnected(connection: number, door: DoorName): void {
    this.#send({ type: 'disconnected', connection, door });
  }

  shutDown(): void {
    if (this.#vtpm) this.#stopSoon(this.#vtpm);
  }

  ended(reason: string | null): void {
    this.#vtpm = undefined;
    this.#send({ type: 'ended', reason });
  }

  #take(chunk: Buffer): void {
    try {
      for (const line of this.#reader.push(chunk)) {
        this.#waiting.push(parseRequest(line));
        if (this.#waiting.length > MAX_WAITING) throw new ShapeError('requests without waiting for answers');
      }
      void this.#work();
    } catch (error) {
      const reason = error instanceof ShapeError ? error.message : 'a line that is too long';
      this.#context.log.warn(
        { uid: this.uid, reason },
        'a drop-in command said what it may not; it is cut off',
      );
      this.#socket.destroy();
    }
  }

  /** One request after the other. Nothing more is read before they are done and their answers are taken. */
  async #work(): Promise<void> {
    if (this.#isWorking) return;
    this.#isWorking = true;
    this.#socket.pause();
    while (this.#hasNext) {
      const type = this.#waiting[0]?.type;
      const done = type === 'create' || type === 'discard' ? await this.#context.creations.turn() : undefined;
      // It may have been held, or have lost its command, until its turn came.
      const request = this.#hasNext ? this.#waiting.shift() : undefined;
      if (request) this.#current = this.#answer(request);
      await this.#current;
      done?.();
      if (this.#socket.writableNeedDrain) await drained(this.#socket);
    }
    this.#isWorking = false;
    if (!this.#isHeld) this.#socket.resume();
  }

  get #hasNext(): boolean {
    return this.#waiting.length > 0 && !this.#isHeld && !this.#socket.destroyed;
  }

  async #answer(request: DropinRequest): Promise<void> {
    try {
      const done = await this.#do(request);
      this.#send({ ...OK, name: this.#vtpm?.entry.name ?? null, ...done });
    } catch (caught) {
      const error = ToolstackError.from(caught);
      if (error.code === 'internal') this.#context.log.error({ err: error }, 'a drop-in call failed');
      this.#send({ type: 'error', code: error.code, message: error.message });
    }
  }

  async #do(request: DropinRequest): Promise<Done> {
    switch (request.type) {
      case 'descriptors':
        if (this.#context.lend(request.session, this)) return OK;
        throw new ToolstackError('bad-request', 'there is no such session');
      case 'create':
        return await this.#create(request);
      case 'inspect': {
        const { entry, state } = this.#permitted(request.token);
        return { name: entry.name, state };
      }
      case 'start':
        return await this.#start(this.#permitted(request.token), request.goesOn);
      case 'connection':
        return { connection: this.#started().admit(request.door, this.#takeDescriptor()) };
      case 'stop':
        await this.#started().stop();
        return {};
      case 'discard':
        return await this.#discard();
    }
  }

  async #create(request: Extract<DropinRequest, { type: 'create' }>): Promise<Done> {
    const { creations } = this.#context;
    const free = creations.reserve(this.uid, request.place);
    try {
      return await this.#createReserved(request);
    } finally {
      free();
    }
  }

  async #createReserved(request: Extract<DropinRequest, { type: 'create' }>): Promise<Done> {
    const { supervisor, paths, log } = this.#context;
    const { id, vmUuid, place, secretSha256 } = request;
    const own = supervisor.all().filter(({ entry }) => entry.dropin?.uid === this.uid);
    if (own.length >= MAX_VTPMS_OF_USER && !isTrusted(this.uid)) {
      throw new ToolstackError(
        'not-permitted',
        `user ${this.uid} has ${own.length} vTPMs, and no more are made by swtpm; delete those that are not needed: vtpmctl list, vtpmctl delete`,
      );
    }
    const there = this.#at(place);
    if (there) {
      const { name } = there.entry;
      throw new ToolstackError(
        'token-refused',
        `${place} is the place of vTPM ${name} and its token is not there; vtpmctl dropin ${name} ${place} makes a new one`,
      );
    }
    const taken = new Set(supervisor.all().map(({ entry }) => entry.name));
    const name = taken.has(request.name) ? `${request.name.slice(0, 54)}-${id.slice(0, 8)}` : request.name;
    await createVtpm(paths, { id, name, vmUuid, dropin: { secretSha256, uid: this.uid, place } });
    this.#made = id;
    log.info({ vtpm: name, uid: this.uid, place }, 'made for a drop-in command');
    return { name };
  }

  async #discard(): Promise<Done> {
    const id = this.#made;
    if (id === undefined) throw new ToolstackError('bad-request', 'this session made no vTPM');
    this.#made = undefined;
    await deleteVtpm(this.#context.paths, id);
    return {};
  }

  /** One that another user says to have there is in nobody's way: no place is looked at. */
  #at(place: string): Vtpm | undefined {
    const isThere = ({ entry }: Vtpm) => entry.dropin?.place === place && entry.dropin.uid === this.uid;
    return this.#context.supervisor.all().find(isThere);
  }

  #permitted(token: PlacedToken): Vtpm {
    const { supervisor } = this.#context;
    const vtpm = supervisor.all().find(({ entry }) => entry.id === token.id);
    if (!vtpm) {
      throw new ToolstackError(
        'unknown-vtpm',
        `the token in ${token.place} is of vTPM ${token.id}, which is not on this host or was deleted; for a new TPM remove the token`,
      );
    }
    checkToken(vtpm.entry, token, this.uid);
    return vtpm;
  }

  async #start(vtpm: Vtpm, goesOn: boolean): Promise<Done> {
    if (this.#vtpm) throw new ToolstackError('bad-request', 'this session has a vTPM already');
    const { name } = vtpm.entry;
    // A VM that is powered off and on at once: its TPM of before is on its way out.
    await vtpm.settled;
    if (goesOn) {
      vtpm.attendAgain(this);
    } else {
      if (vtpm.isAttended) {
        throw new ToolstackError(
          'already-running',
          `vTPM ${name} runs already, for another swtpm with the token in ${vtpm.entry.dropin?.place}; there is one of each`,
        );
      }
      await vtpm.start(this);
    }
    this.#vtpm = vtpm;
    // It may have come to its end, or the command may have gone, meanwhile.
    if (!vtpm.isAttended) throw new ToolstackError('worker-failed', `vTPM ${name} ended at once`);
    if (this.#socket.destroyed) this.#left();
    return { state: vtpm.state, connections: vtpm.connections };
  }

  #started(): Vtpm {
    if (this.#vtpm) return this.#vtpm;
    throw new ToolstackError('not-running', 'the vTPM is not started');
  }

  #takeDescriptor(): number {
    const fd = this.#descriptors && receiveDescriptor(this.#descriptors);
    if (fd === undefined) throw new ToolstackError('bad-request', 'no descriptor came with the connection');
    if (isSocket(fd)) return fd;
    closeUnknown(fd);
    throw new ToolstackError('bad-request', 'what was passed as a connection is no socket');
  }

  #send(message: DropinMessage): void {
    if (!this.#socket.destroyed) this.#socket.write(lineOf(message));
  }

  #forgetDescriptors(): void {
    if (this.#descriptors !== undefined) closeSync(this.#descriptors);
    this.#descriptors = undefined;
  }

  /** The command ended, however it did: then its TPM is powered off, as swtpm's is. */
  #left(): void {
    this.#forgetDescriptors();
    const vtpm = this.#vtpm;
    this.#vtpm = undefined;
    if (vtpm) this.#stopSoon(vtpm);
  }

  #stopSoon(vtpm: Vtpm): void {
    if (vtpm.state === 'stopping') return;
    vtpm.stop().catch((error: Error) => {
      this.#context.log.error({ vtpm: vtpm.entry.name, reason: error.message }, 'not stopped in order');
    });
  }
}

/** Or closed. */
async function drained(socket: Socket): Promise<void> {
  const over = new AbortController();
  const { signal } = over;
  await Promise.race([once(socket, 'drain', { signal }), once(socket, 'close', { signal })]).catch(
    () => undefined,
  );
  over.abort();
}
