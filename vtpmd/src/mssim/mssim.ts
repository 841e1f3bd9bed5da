import { type Frame, framed, type Message, ONLY_ZERO } from '../channels/framing.js';
import type { TpmEngine } from '../engine/engine.js';
import type { CommandQueue } from '../worker/command-queue.js';
import type { CommandSource } from '../worker/command-source.js';
import { type Answer, PortConnection } from './port.js';
import {
  type CommandRequest,
  DONE,
  type PlatformRequest,
  REFUSED,
  readCommandRequest,
  readPlatformRequest,
  words,
} from './protocol.js';

/** What turns the TPM on and off. */
export interface Power {
  readonly isOn: boolean;
  /** A power cycle where it is on. */
  on(): Promise<void>;
  off(): Promise<void>;
}

/** Version of the protocol, and of what its server says of itself: raw TPM, platform port, physical presence. */
const SERVER_VERSION = 1;
const END_POINT_INFO = 0x01 | 0x04 | 0x08;

/** A command that came to the command port. */
class PortCommand implements CommandSource {
  command: Buffer;
  readonly kind = 'tcti';
  readonly frame: Frame | undefined;
  readonly refusal: number | undefined;

  constructor(
    { command, frame }: Message,
    private readonly port: { readonly isGone: boolean },
    private readonly done: (response: Buffer) => void,
  ) {
    this.command = command;
    this.frame = frame;
    this.refusal = frame?.refusal(ONLY_ZERO);
  }

  get isGone(): boolean {
    return this.port.isGone;
  }

  answer(response: Buffer): void {
    this.done(framed(response));
  }

  dropped(): void {
    this.done(Buffer.alloc(0));
  }
}

/**
 * The TCG simulator's two ports: whoever may connect to them is the TPM's platform and its guest in one, so no VM has them.
 * They end with their worker: TCP does not say, after a kill -9, what of a stream was taken.
 */
export class Mssim {
  readonly #engine: TpmEngine;
  readonly #queue: CommandQueue;
  readonly #power: Power;
  readonly #commands = new Set<CommandSource>();

  constructor(engine: TpmEngine, queue: CommandQueue, power: Power) {
    this.#engine = engine;
    this.#queue = queue;
    this.#power = power;
  }

  openCommandPort(fd: number, onClosed: () => void): void {
    const connection: PortConnection<CommandRequest> = new PortConnection(fd, {
      read: readCommandRequest,
      answer: (request) => this.#answerCommand(request, connection),
      onClosed,
    });
  }

  openPlatformPort(fd: number, onClosed: () => void): void {
    new PortConnection(fd, {
      read: readPlatformRequest,
      answer: (request) => this.#answerPlatform(request),
      onClosed,
    });
  }

  async #answerCommand(request: CommandRequest, connection: { readonly isGone: boolean }): Promise<Answer> {
    switch (request.type) {
      case 'command':
        return { bytes: await this.#run(request.message, connection), ends: request.message.isBroken };
      case 'handshake':
        // Version 0 is nobody's.
        if (request.version === 0) return { bytes: words(REFUSED), ends: true };
        return { bytes: words(SERVER_VERSION, END_POINT_INFO, DONE) };
      default:
        return await this.#answerAny(request.type);
    }
  }

  async #answerPlatform(request: PlatformRequest): Promise<Answer> {
    switch (request.type) {
      case 'power-on':
        return await this.#act(async () => {
          if (!this.#power.isOn) await this.#power.on();
        });
      case 'reset':
        return await this.#act(async () => {
          if (this.#power.isOn) await this.#power.on();
        });
      case 'power-off':
        return await this.#act(() => this.#power.off());
      case 'presence-on':
      case 'presence-off':
        this.#engine.setPhysicalPresence(request.type === 'presence-on');
        return { bytes: words(DONE) };
      case 'cancel-on': {
        // libtpms takes the flag back with the next command by itself.
        const { current } = this.#queue;
        if (current && this.#commands.has(current)) this.#engine.cancel();
        return { bytes: words(DONE) };
      }
      case 'cancel-off':
      case 'nv-on':
        return { bytes: words(DONE) };
      default:
        return await this.#answerAny(request.type);
    }
  }

  async #answerAny(type: 'end' | 'stop' | 'refused' | 'unknown'): Promise<Answer> {
    switch (type) {
      case 'end':
        return { bytes: Buffer.alloc(0), ends: true };
      case 'stop':
        // The simulator ends its process, which here is not the client's to end.
        return { ...(await this.#act(() => this.#power.off())), ends: true };
      case 'refused':
        return { bytes: words(REFUSED) };
      case 'unknown':
        return { bytes: words(REFUSED), ends: true };
    }
  }

  async #act(step: () => Promise<void>): Promise<Answer> {
    try {
      await step();
      return { bytes: words(DONE) };
    } catch {
      // Such as a power-on while the manager is away.
      return { bytes: words(REFUSED) };
    }
  }

  async #run(message: Message, connection: { readonly isGone: boolean }): Promise<Buffer> {
    let source: PortCommand | undefined;
    try {
      return await new Promise((resolve) => {
        source = new PortCommand(message, connection, resolve);
        this.#commands.add(source);
        this.#queue.submit(source);
      });
    } finally {
      if (source) this.#commands.delete(source);
    }
  }
}
