import type { Socket } from 'node:net';
import { type ConnectOptions, connectTo } from '../connecting.js';
import { FrontendError } from '../error.js';
import { sendWithDescriptors } from '../system-calls.js';
import { MOST_PAGES } from './memory.js';
import { RingPort } from './port.js';

/** xen/include/public/io/xenbus.h */
const XENBUS = { InitWait: 2, Initialised: 3, Connected: 4, Closing: 5, Closed: 6 } as const;
const FEATURE = 'feature-protocol-v2';
const MOST_MESSAGE_BYTES = 4096;

export interface OpenOptions {
  /** 1 to 4; two unless given, which is enough for every command and answer. */
  readonly pages?: number;
  /** Milliseconds to wait for the backend; 5000 unless given. */
  readonly timeout?: number;
}

/**
 * A connection to the ring door of a vTPM, where a ring can be opened, closed and opened again: a boot loader measures and
 * closes, and the kernel opens. One ring is open at a time.
 */
export class RingDevice {
  readonly ended: Promise<FrontendError>;
  readonly #socket: Socket;
  #pending = '';
  #isInvited = false;
  #port: RingPort | undefined;
  #end: FrontendError | undefined;
  #resolveEnded: (reason: FrontendError) => void = () => {};
  #waiter: { readonly state: number; resolve(): void } | undefined;

  /** @throws FrontendError `unreachable` */
  static async connect(target: string | ConnectOptions): Promise<RingDevice> {
    return new RingDevice(await connectTo(typeof target === 'string' ? { path: target } : target));
  }

  private constructor(socket: Socket) {
    this.#socket = socket;
    this.ended = new Promise((resolve) => {
      this.#resolveEnded = resolve;
    });
    socket.setEncoding('latin1');
    socket.on('data', (chunk: string) => this.#onData(chunk));
    socket.on('error', (cause) =>
      this.#finish(new FrontendError('closed', `the ring broke: ${cause.message}`)),
    );
    socket.on('close', () => this.#finish(new FrontendError('closed', 'the vTPM closed the ring')));
  }

  /** @throws FrontendError `refused`, with the vTPM's reason; `closed`; `usage` where one is open */
  async open({ pages = 2, timeout = 5000 }: OpenOptions = {}): Promise<RingPort> {
    if (this.#port) throw new FrontendError('usage', 'a ring is open on this connection; close it first');
    if (!Number.isInteger(pages) || pages < 1 || pages > MOST_PAGES) {
      throw new FrontendError('usage', `a ring has 1 to ${MOST_PAGES} pages`);
    }
    const giveUp = setTimeout(
      () => this.#finish(new FrontendError('unreachable', `the ring was not opened within ${timeout} ms`)),
      timeout,
    );
    try {
      if (!this.#isInvited) await this.#until(XENBUS.InitWait);
      if (this.#end) throw this.#end;
      const port = new RingPort(pages);
      this.#port = port;
      try {
        const connected = this.#until(XENBUS.Connected);
        const message = Buffer.from(`state=${XENBUS.Initialised}\n${FEATURE}=1\n\n`);
        sendWithDescriptors(fdOf(this.#socket), message, port.descriptors);
        port.passed();
        await connected;
        return port;
      } catch (error) {
        this.closePort();
        throw error;
      }
    } finally {
      clearTimeout(giveUp);
    }
  }

  /** The next ring can be opened. */
  closePort(): void {
    this.#port?.close();
    this.#port = undefined;
  }

  async close(): Promise<void> {
    this.#finish(new FrontendError('closed', 'the ring was closed on this side'));
    if (!this.#socket.closed) await new Promise<void>((resolve) => this.#socket.once('close', resolve));
  }

  /** A backend that another one follows says everything again: what is known already changes nothing. */
  async #until(state: number): Promise<void> {
    if (this.#end) throw this.#end;
    const said = new Promise<void>((resolve) => {
      this.#waiter = { state, resolve };
    });
    const reason = await Promise.race([said, this.ended]);
    if (reason) throw reason;
  }

  #onData(chunk: string): void {
    this.#pending += chunk;
    for (let end = this.#pending.indexOf('\n\n'); end >= 0; end = this.#pending.indexOf('\n\n')) {
      const message = this.#pending.slice(0, end);
      this.#pending = this.#pending.slice(end + 2);
      this.#heard(new Map(message.split('\n').map((line) => split(line))));
    }
    if (this.#pending.length > MOST_MESSAGE_BYTES) {
      this.#finish(new FrontendError('protocol', 'the vTPM sent a message without an end'));
    }
  }

  #heard(nodes: ReadonlyMap<string, string>): void {
    const state = Number(nodes.get('state'));
    if (state === XENBUS.InitWait) {
      if (nodes.get(FEATURE) !== '1') {
        this.#finish(new FrontendError('refused', `the vTPM does not have ${FEATURE}`));
        return;
      }
      this.#isInvited = true;
    }
    if (state === XENBUS.Closing || state === XENBUS.Closed) {
      this.#finish(new FrontendError('refused', nodes.get('error') ?? 'the vTPM closed the ring'));
      return;
    }
    if (this.#waiter?.state === state) this.#waiter.resolve();
  }

  #finish(reason: FrontendError): void {
    if (this.#end) return;
    this.#end = reason;
    this.#socket.destroy();
    // Before its memory is gone: whoever waits looks there for what became of a command.
    this.#port?.onEnd();
    this.closePort();
    this.#resolveEnded(reason);
  }
}

function split(line: string): [string, string] {
  const at = line.indexOf('=');
  return [line.slice(0, at), line.slice(at + 1)];
}

/** The descriptor under a socket; Node has no public way to it. */
function fdOf(socket: Socket): number {
  const fd = (socket as unknown as { _handle?: { fd?: number } | null })._handle?.fd;
  if (typeof fd !== 'number' || fd < 0) throw new FrontendError('closed', 'the connection is closed');
  return fd;
}
