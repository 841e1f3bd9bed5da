import { setTimeout as delay } from 'node:timers/promises';
import type { TpmChannel, TransmitOptions } from './channel.js';
import { FrontendError } from './error.js';

export interface ReconnectOptions {
  /** Milliseconds to try for a new channel before a command is refused; 30 000 unless given. */
  readonly patience?: number;
}

const FIRST_PAUSE_MS = 10;
const LONGEST_PAUSE_MS = 500;

/**
 * A way to a vTPM that is made anew where it ended: after a restart of the service, or where the vTPM was stopped and started.
 * (A worker that is replaced ends nothing.) A command that was not sent is sent on the new channel. One that was sent is told
 * as `lost`, because whether the TPM ran it is not known, and it is never sent twice.
 */
export class ReconnectingChannel implements TpmChannel {
  readonly canCancel: boolean;
  readonly ended: Promise<FrontendError>;
  readonly #connect: () => Promise<TpmChannel>;
  readonly #patience: number;
  readonly #closing = new AbortController();
  /** Absent from an end to the next command. */
  #channel: Promise<TpmChannel> | undefined;
  #resolveEnded: (reason: FrontendError) => void = () => {};

  /** @throws what `connect` throws: the first time nobody waits */
  static async open(
    connect: () => Promise<TpmChannel>,
    { patience = 30_000 }: ReconnectOptions = {},
  ): Promise<ReconnectingChannel> {
    return new ReconnectingChannel(connect, patience, await connect());
  }

  private constructor(connect: () => Promise<TpmChannel>, patience: number, first: TpmChannel) {
    this.#connect = connect;
    this.#patience = patience;
    this.ended = new Promise((resolve) => {
      this.#resolveEnded = resolve;
    });
    this.canCancel = first.canCancel;
    this.#use(first);
  }

  /** As TpmChannel; also `unreachable`, where there is no new channel within the time. */
  async transmit(command: Uint8Array, options: TransmitOptions = {}): Promise<Buffer> {
    const { deadline, signal } = options;
    const start = performance.now();
    const bytes = Buffer.from(command);
    for (;;) {
      if (this.#isClosed) throw closedHere();
      const left = deadline === undefined ? undefined : deadline - (performance.now() - start);
      const channel = await within(this.#channel ?? this.#reconnect(), left, signal);
      try {
        return await channel.transmit(bytes, left === undefined ? options : { ...options, deadline: left });
      } catch (error) {
        if (!(error instanceof FrontendError) || error.code !== 'closed') throw error;
        await channel.ended;
      }
    }
  }

  async close(): Promise<void> {
    if (this.#isClosed) return;
    this.#closing.abort();
    this.#resolveEnded(closedHere());
    await this.#channel?.then(
      (channel) => channel.close(),
      () => undefined,
    );
  }

  get #isClosed(): boolean {
    return this.#closing.signal.aborted;
  }

  #use(channel: TpmChannel): void {
    this.#channel = Promise.resolve(channel);
    void channel.ended.then(() => {
      this.#channel = undefined;
    });
  }

  #reconnect(): Promise<TpmChannel> {
    this.#channel = this.#tryToConnect().then(
      async (channel) => {
        this.#use(channel);
        if (this.#isClosed) await channel.close();
        return channel;
      },
      (error: unknown) => {
        this.#channel = undefined;
        throw error;
      },
    );
    return this.#channel;
  }

  async #tryToConnect(): Promise<TpmChannel> {
    const until = performance.now() + this.#patience;
    for (let pause = FIRST_PAUSE_MS; ; pause = Math.min(2 * pause, LONGEST_PAUSE_MS)) {
      try {
        return await this.#connect();
      } catch (error) {
        if (this.#isClosed) throw closedHere();
        if (performance.now() + pause > until) throw error;
        await delay(pause, undefined, { signal: this.#closing.signal }).catch(() => undefined);
      }
    }
  }
}

function closedHere(): FrontendError {
  return new FrontendError('closed', 'the channel was closed on this side');
}

/** The channel, where it is there in time. @throws FrontendError `deadline`, `aborted` */
async function within(
  channel: Promise<TpmChannel>,
  left: number | undefined,
  signal: AbortSignal | undefined,
): Promise<TpmChannel> {
  const limits = [
    ...(left === undefined ? [] : [AbortSignal.timeout(Math.max(0, Math.ceil(left)))]),
    ...(signal ? [signal] : []),
  ];
  if (limits.length === 0) return await channel;
  const limit = AbortSignal.any(limits);
  const given = new Promise<FrontendError>((resolve) => {
    const stop = (): void =>
      resolve(
        signal?.aborted
          ? new FrontendError('aborted', 'given up before it was sent', signal.reason)
          : new FrontendError('deadline', 'there was no way to the vTPM within the time'),
      );
    if (limit.aborted) stop();
    else limit.addEventListener('abort', stop, { once: true });
  });
  const first = await Promise.race([channel, given]);
  if (first instanceof FrontendError) throw first;
  return first;
}
