import { once } from 'node:events';
import { setTimeout as delay } from 'node:timers/promises';
import type { ServerDuplexStream } from '@grpc/grpc-js';
import type { Logger } from 'vtpm-common';
import { encode, type ManagerFrame } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import { metrics } from '../metrics.js';
import type { AttachedStream, SaveLink } from '../ownership/registry.js';
import type { AdmittedConnection, CallLimits } from './limits.js';
import { readMessage } from './messages.js';
import type { WorkerService } from './server.js';
import { refusal, statusOf } from './status.js';

/** Milliseconds until the first frame must be there. Later silence is a guest that does nothing. */
const FIRST_FRAME_MS = 10_000;

type Call = ServerDuplexStream<Buffer, Buffer>;

/**
 * Runs one Save stream: frame by frame, the next one read when the last one is answered and paid for, so that what a
 * worker sends ahead or too much waits in its own socket.
 */
export function serveSaveStream(
  call: Call,
  service: () => WorkerService,
  connection: AdmittedConnection,
  limits: CallLimits,
  log: Logger,
): void {
  const link = new GrpcLink(call);
  let attached: AttachedStream | undefined;
  let isGone = false;
  const timer = setTimeout(() => {
    link.end(new ManagerError('bad-request', `no HELLO or RESUME within ${FIRST_FRAME_MS} ms`));
  }, FIRST_FRAME_MS);

  const take = async (bytes: Buffer): Promise<void> => {
    const frame = readMessage('WorkerFrame', bytes);
    if (attached) return await attached.receive(frame);
    clearTimeout(timer);
    attached = await service().attach(frame, link, connection.worker);
    // It went while it was let in.
    if (isGone) attached.detach();
  };
  const refuse = (error: unknown): void => {
    if (link.isEnded || call.cancelled) return;
    const reason = refusal(error);
    metrics.saveAnswered(reason.code);
    log.warn({ reason: reason.code, cause: (reason.cause as Error | undefined)?.message }, reason.message);
    link.end(reason);
  };
  // Not an async iterator: it destroys the stream when it stops, and the status with it.
  call.on('data', (bytes: Buffer) => {
    if (link.isEnded) return;
    call.pause();
    const pause = limits.admitMessage(connection, bytes.length);
    take(bytes)
      .then(async () => {
        if (pause > 0) await delay(pause, undefined, { ref: false });
        call.resume();
      })
      .catch(refuse);
  });
  call.once('end', () => link.finish());
  const gone = (): void => {
    isGone = true;
    clearTimeout(timer);
    link.abandon();
    attached?.detach();
  };
  link.onEnd = gone;
  call.once('cancelled', gone);
  call.once('close', gone);
}

class GrpcLink implements SaveLink {
  onEnd: () => void = () => undefined;
  readonly #over = new AbortController();

  constructor(private readonly call: Call) {}

  get isEnded(): boolean {
    return this.#over.signal.aborted;
  }

  async send(frame: ManagerFrame): Promise<void> {
    if (this.isEnded) throw new ManagerError('fenced', 'the stream has ended');
    if (this.call.write(encode('ManagerFrame', frame))) return;
    await once(this.call, 'drain', { signal: this.#over.signal });
  }

  /** Frames that were sent before go out first: the status is written after them. */
  end(error: ManagerError): void {
    if (this.isEnded) return;
    this.#over.abort();
    this.call.emit('error', statusOf(error));
    this.onEnd();
  }

  /** The worker has ended its half in order. */
  finish(): void {
    if (this.isEnded) return;
    this.#over.abort();
    this.call.end();
    this.onEnd();
  }

  /** The worker is gone: who waits for it to read waits no longer. */
  abandon(): void {
    this.#over.abort();
  }
}
