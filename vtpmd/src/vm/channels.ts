import type { Socket } from 'node:net';
import { Duplex } from 'node:stream';
import { VtpmdError } from '../error.js';
import { encodeFrame, encodeNumber, type Frame, FrameReader, MAX_PAYLOAD_BYTES } from './frames.js';

/** Bytes of a channel that may be under way, or wait for their reader, in one direction. */
export const WINDOW_BYTES = 64 * 1024;
/** Channels at once: a worker has a control channel, manager links and the connections of three doors with 64 each. */
const MAX_CHANNELS = 256;
/** The control channel is there from the beginning. */
const CONTROL = 0;

export interface ChannelEvents {
  /** The peer opened a channel. Where absent, that is a breach of the protocol. */
  opened?(channel: Duplex): void;
  /** The peer ends with this status: nothing follows. */
  exited?(status: number): void;
  /** The transport is over, or the peer broke the protocol. Called once; every channel is closed by then. */
  failed(error: VtpmdError): void;
}

/**
 * Many byte streams over one. Each has a window of its own, so one whose reader is slow holds up no other and costs a
 * bounded amount of memory, whatever the peer does.
 */
export class Channels {
  readonly control: Duplex;
  readonly #transport: Duplex;
  readonly #events: ChannelEvents;
  readonly #channels = new Map<number, Channel>();
  readonly #reader = new FrameReader();
  #nextId = CONTROL + 1;
  #hasFailed = false;

  constructor(transport: Duplex, events: ChannelEvents) {
    this.#transport = transport;
    this.#events = events;
    this.control = this.#add(CONTROL);
    transport.on('data', (chunk: Buffer) => this.#receive(chunk));
    transport.on('error', (cause) => this.#fail(lost(cause)));
    transport.on('end', () => this.#fail(lost()));
    transport.on('close', () => this.#fail(lost()));
  }

  /** @throws VtpmdError `protocol` where there are too many */
  open(): Duplex {
    if (this.#channels.size >= MAX_CHANNELS) throw new VtpmdError('protocol', 'too many channels');
    const id = this.#nextId++;
    this.#transport.write(encodeFrame(id, 'open'));
    return this.#add(id);
  }

  /** Says that this side ends; call it last. */
  exit(status: number): void {
    this.#transport.write(encodeNumber(CONTROL, 'exit', status));
  }

  #add(id: number): Channel {
    const channel: Channel = new Channel(id, this.#transport, () => this.#channels.delete(id));
    this.#channels.set(id, channel);
    return channel;
  }

  #receive(chunk: Buffer): void {
    if (this.#hasFailed) return;
    try {
      for (const frame of this.#reader.push(chunk)) this.#take(frame);
    } catch (error) {
      this.#fail(VtpmdError.from(error));
    }
  }

  #take(frame: Frame): void {
    const { channel: id, type, payload } = frame;
    if (type === 'exit') {
      this.#events.exited?.(payload.readUInt32BE());
    } else if (type === 'open') {
      const isNext = id === this.#nextId && this.#channels.size < MAX_CHANNELS;
      if (!this.#events.opened || !isNext)
        throw new VtpmdError('protocol', 'a channel that may not be opened');
      this.#nextId++;
      this.#events.opened(this.#add(id));
    } else {
      if (id >= this.#nextId) throw new VtpmdError('protocol', 'a frame of no channel');
      // Of one that was closed here, frames may still be on their way.
      this.#channels.get(id)?.receive(frame);
    }
  }

  #fail(error: VtpmdError): void {
    if (this.#hasFailed) return;
    this.#hasFailed = true;
    for (const channel of this.#channels.values()) channel.abandon();
    this.#transport.destroy();
    this.#events.failed(error);
  }
}

/** Carries bytes between a socket and a channel until both ways are over, or one of the two is closed. */
export function join(socket: Socket, channel: Duplex): void {
  socket.on('error', () => undefined);
  socket.pipe(channel);
  channel.pipe(socket);
  socket.on('close', () => {
    if (socket.readableEnded) channel.end(() => channel.destroy());
    else channel.destroy();
  });
  channel.on('close', () => {
    if (channel.readableEnded) socket.destroySoon();
    else socket.destroy();
  });
}

/** One of the streams. */
class Channel extends Duplex {
  readonly #id: number;
  readonly #transport: Duplex;
  readonly #forget: () => void;
  /** That may still be sent. */
  #credit = WINDOW_BYTES;
  /** That the peer may still send. */
  #room = WINDOW_BYTES;
  /** Taken by the reader since the peer last heard of it. */
  #taken = 0;
  #waiting: { chunk: Buffer; done: (error?: Error | null) => void } | undefined;
  #isEndedByPeer = false;
  #isClosedByPeer = false;

  constructor(id: number, transport: Duplex, forget: () => void) {
    super({ allowHalfOpen: true, readableHighWaterMark: WINDOW_BYTES });
    this.#id = id;
    this.#transport = transport;
    this.#forget = forget;
    // Its owner sees the end in `close`.
    this.on('error', () => undefined);
  }

  receive({ type, payload }: Frame): void {
    if (this.destroyed) return;
    switch (type) {
      case 'data':
        this.#room -= payload.length;
        if (this.#room < 0 || this.#isEndedByPeer) {
          throw new VtpmdError('protocol', 'more bytes than the window holds, or after the end');
        }
        this.push(payload);
        return;
      case 'end':
        if (!this.#isEndedByPeer) this.push(null);
        this.#isEndedByPeer = true;
        return;
      case 'close':
        this.#isClosedByPeer = true;
        // What came before the end is still to be read.
        if (this.#isEndedByPeer && !this.readableEnded) this.once('end', () => this.destroy());
        else this.destroy();
        return;
      case 'credit':
        this.#credit += payload.readUInt32BE();
        if (this.#credit > WINDOW_BYTES) throw new VtpmdError('protocol', 'more credit than the window has');
        this.#sendWaiting();
        return;
    }
  }

  /** The transport is gone: nothing is said any more. */
  abandon(): void {
    this.#isClosedByPeer = true;
    this.destroy();
  }

  override _read(): void {}

  /** What its reader takes, the peer may send again. */
  override emit(event: string | symbol, ...args: unknown[]): boolean {
    if (event === 'data') this.#grant(Buffer.byteLength(args[0] as Buffer | string));
    return super.emit(event, ...args);
  }

  override _write(chunk: Buffer, _encoding: BufferEncoding, done: (error?: Error | null) => void): void {
    if (chunk.length === 0) {
      done();
      return;
    }
    this.#waiting = { chunk, done };
    this.#sendWaiting();
  }

  override _final(done: (error?: Error | null) => void): void {
    this.#transport.write(encodeFrame(this.#id, 'end'), done);
  }

  override _destroy(error: Error | null, done: (error?: Error | null) => void): void {
    this.#forget();
    const isOver = this.#isEndedByPeer && this.writableFinished;
    if (!isOver && !this.#isClosedByPeer && !this.#transport.destroyed) {
      this.#transport.write(encodeFrame(this.#id, 'close'));
    }
    done(error);
  }

  #sendWaiting(): void {
    while (this.#waiting && this.#credit > 0) {
      const { chunk, done } = this.#waiting;
      const size = Math.min(chunk.length, this.#credit, MAX_PAYLOAD_BYTES);
      this.#credit -= size;
      const isLast = size === chunk.length;
      this.#waiting = isLast ? undefined : { chunk: chunk.subarray(size), done };
      const frame = encodeFrame(this.#id, 'data', chunk.subarray(0, size));
      this.#transport.write(frame, isLast ? (error) => done(error) : undefined);
    }
  }

  #grant(bytes: number): void {
    this.#taken += bytes;
    if (this.#taken < WINDOW_BYTES / 2 || this.destroyed || this.#transport.destroyed) return;
    this.#room += this.#taken;
    this.#transport.write(encodeNumber(this.#id, 'credit', this.#taken));
    this.#taken = 0;
  }
}

function lost(cause?: Error): VtpmdError {
  return new VtpmdError('link-lost', 'the port between the VM and its host is closed', { cause });
}
