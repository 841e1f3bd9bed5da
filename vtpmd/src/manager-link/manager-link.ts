import { type ClientHttp2Session, type ClientHttp2Stream, connect } from 'node:http2';
import type { Duplex } from 'node:stream';
import {
  decode,
  encode,
  frameMessage,
  LOAD_PATH,
  type LoadRequest,
  type LoadResponse,
  type ManagerFrame,
  SAVE_PATH,
  type WorkerFrame,
} from 'vtpm-proto';
import { type CallEnd, receiveCall, startCall as startGrpcCall } from 'vtpm-proto/grpc-call';
import { VtpmdError } from '../error.js';
import { refusalOf } from './refusal.js';

/**
 * One connection to the manager's `vtpm.v1.VtpmManager`, over a socket that was connected by somebody else. Speaks
 * gRPC's wire format (PROTOCOL-HTTP2) on node:http2: the gRPC package would cost more memory than the TPM.
 */
export interface ManagerLink {
  /** @throws VtpmdError `refused`, or `link-lost` where the call got no answer or none that is final */
  load(request: LoadRequest): Promise<LoadResponse>;
  /** Begins the Save stream that `openSave` goes on with: there is time for it while a Load is answered. */
  prepareSave(): void;
  /** Opens the Save stream. `onEnd` is called once: the stream and the link are over. */
  openSave(onFrame: (frame: ManagerFrame) => void, onEnd: (error: VtpmdError) => void): SaveStream;
  /** Resolves when the manager has said its first word. Never where it says none. */
  readonly greeted: Promise<void>;
  /** Resolves when the link is over, whoever ended it. */
  readonly closed: Promise<void>;
  close(): void;
}

export interface SaveStream {
  send(frame: WorkerFrame): void;
}

export function openManagerLink(socket: Duplex): ManagerLink {
  const session = connect('http://localhost', { createConnection: () => socket });
  // Each call sees the loss as an error of its own stream.
  session.on('error', () => {});
  let prepared: PreparedCall | undefined;
  return {
    load: (request) => load(session, request),
    prepareSave: () => {
      prepared ??= new PreparedCall(session, SAVE_PATH);
    },
    openSave: (onFrame, onEnd) => {
      const stream = prepared?.take();
      prepared = undefined;
      return openSave(session, stream, onFrame, onEnd);
    },
    greeted: new Promise((resolve) => session.once('remoteSettings', () => resolve())),
    closed: new Promise((resolve) => session.once('close', resolve)),
    close: () => session.destroy(),
  };
}

/** @throws VtpmdError `link-lost` where the session is closed already */
function startCall(session: ClientHttp2Session, path: string): ClientHttp2Stream {
  try {
    return startGrpcCall(session, path);
  } catch (cause) {
    throw new VtpmdError('link-lost', 'the link to the manager broke', { cause });
  }
}

/** A call that nothing was said on yet. */
class PreparedCall {
  #stream: ClientHttp2Stream | undefined;

  constructor(session: ClientHttp2Session, path: string) {
    let stream: ClientHttp2Stream;
    try {
      stream = startCall(session, path);
    } catch {
      // Whoever needs the call hears of it.
      return;
    }
    this.#stream = stream;
    const spoil = (): void => {
      this.#stream = undefined;
      stream.close();
    };
    stream.on('error', () => {});
    for (const event of ['response', 'close'] as const) stream.once(event, spoil);
    this.#unwatch = () => {
      for (const event of ['response', 'close'] as const) stream.removeListener(event, spoil);
    };
  }

  #unwatch = (): void => {};

  /** @returns undefined where the manager has ended it: it waits for a first message for some seconds only */
  take(): ClientHttp2Stream | undefined {
    this.#unwatch();
    return this.#stream;
  }
}

/** Calls `onMessage` for each message and `onEnd` once: undefined where the manager says that all is well. */
function receive(
  stream: ClientHttp2Stream,
  onMessage: (message: Buffer) => void,
  onEnd: (error: VtpmdError | undefined) => void,
): void {
  receiveCall(stream, onMessage, (end) => onEnd(failureOf(end)));
}

function failureOf(end: CallEnd): VtpmdError | undefined {
  switch (end.kind) {
    case 'status':
      return refusalOf(end);
    case 'cut':
      return new VtpmdError('link-lost', `the link to the manager is lost: ${end.message}`);
    case 'unreadable':
      return new VtpmdError('protocol', `the manager sent what cannot be read: ${messageOf(end.cause)}`, {
        cause: end.cause,
      });
  }
}

function load(session: ClientHttp2Session, request: LoadRequest): Promise<LoadResponse> {
  return new Promise((resolve, reject) => {
    const stream = startCall(session, LOAD_PATH);
    receive(
      stream,
      // Whether it is the manager's it says itself: the status that follows is not waited for.
      (message) => resolve(decode('LoadResponse', message)),
      (error) => reject(error ?? new VtpmdError('protocol', 'the manager answered Load without a message')),
    );
    stream.end(frameMessage(encode('LoadRequest', request)));
  });
}

function openSave(
  session: ClientHttp2Session,
  prepared: ClientHttp2Stream | undefined,
  onFrame: (frame: ManagerFrame) => void,
  onEnd: (error: VtpmdError) => void,
): SaveStream {
  let stream: ClientHttp2Stream;
  try {
    stream = prepared ?? startCall(session, SAVE_PATH);
  } catch (error) {
    queueMicrotask(() => onEnd(VtpmdError.from(error)));
    return { send: () => {} };
  }
  receive(
    stream,
    (message) => onFrame(decode('ManagerFrame', message)),
    (error) => {
      session.destroy();
      onEnd(error ?? new VtpmdError('link-lost', 'the manager ended the save stream'));
    },
  );
  return { send: (frame) => void stream.write(frameMessage(encode('WorkerFrame', frame))) };
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
