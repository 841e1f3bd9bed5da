import { once } from 'node:events';
import type { ServerDuplexStream } from '@grpc/grpc-js';
import type { Logger } from 'vtpm-common';
import { encode, type ManagerFrame } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import type { AttachedStream, SaveLink, WorkerConnection } from '../ownership/registry.js';
import { readMessage } from './messages.js';
import type { WorkerService } from './server.js';
import { refusal, statusOf } from './status.js';

/** Milliseconds until the first frame must be there. Later silence is a guest that does nothing. */
const FIRST_FRAME_MS = 10_000;

type Call = ServerDuplexStream<Buffer, Buffer>;

/**
 * Runs one Save stream: frame by frame, the next one read when the last one is answered, so that what a worker sends
 * ahead waits in its own socket. Never rejects.
 */
export async function serveSaveStream(
  call: Call,
  service: () => WorkerService,
  connection: WorkerConnection,
  log: Logger,
): Promise<void> {
  const link = new GrpcLink(call);
  let attached: AttachedStream | undefined;
  const timer = setTimeout(() => {
    link.end(new ManagerError('bad-request', `no HELLO or RESUME within ${FIRST_FRAME_MS} ms`));
  }, FIRST_FRAME_MS);
  try {
    for await (const bytes of call as AsyncIterable<Buffer>) {
      const frame = readMessage('WorkerFrame', bytes);
      if (attached) {
        await attached.receive(frame);
      } else {
        clearTimeout(timer);
        attached = await service().attach(frame, link, connection);
      }
    }
    link.finish();
  } catch (error) {
    if (!link.isEnded && !call.cancelled) {
      const reason = refusal(error);
      log.warn({ reason: reason.code, cause: (reason.cause as Error | undefined)?.message }, reason.message);
      link.end(reason);
    }
  } finally {
    clearTimeout(timer);
    attached?.detach();
  }
}

class GrpcLink implements SaveLink {
  isEnded = false;

  constructor(private readonly call: Call) {}

  async send(frame: ManagerFrame): Promise<void> {
    if (this.isEnded || this.call.cancelled) throw new ManagerError('fenced', 'the stream has ended');
    if (this.call.write(encode('ManagerFrame', frame))) return;
    await once(this.call, 'drain', { signal: this.#ended.signal });
  }

  /** Frames that were sent before go out first (the status is written after them). */
  end(error: ManagerError): void {
    if (this.isEnded) return;
    this.isEnded = true;
    this.#ended.abort();
    this.call.emit('error', statusOf(error));
  }

  finish(): void {
    if (this.isEnded) return;
    this.isEnded = true;
    this.#ended.abort();
    this.call.end();
  }

  readonly #ended = new AbortController();
}
