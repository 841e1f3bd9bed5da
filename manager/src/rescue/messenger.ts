import { setTimeout as delay } from 'node:timers/promises';
import type { Logger } from 'vtpm-common';
import type { Peer } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import type { PeerChannel } from '../peer/channel.js';
import { type RescueBook, tellRescues } from './exchange.js';

export interface MessengerOptions {
  readonly book: RescueBook;
  readonly log: Logger;
  peers(): readonly Peer[];
  dial(peer: Peer): Promise<PeerChannel>;
  /** Milliseconds between two attempts, the first and the longest. */
  readonly backoffMs?: readonly [number, number];
}

const BACKOFF_MS = [1_000, 300_000] as const;

/**
 * Tells hosts that were dead what was rescued from them, and asks whether something was rescued from this one. Contact in
 * either direction does both.
 */
export class RescueMessenger {
  readonly #stop = new AbortController();
  /** Host ids in hex of those that are being told. */
  readonly #told = new Map<string, Promise<void>>();

  constructor(private readonly options: MessengerOptions) {}

  /**
   * Asks every peer whether it rescued something from here. What they say is in effect when it resolves.
   * @param limitMs nobody is waited for any longer; who has not answered by then is asked again later
   */
  async askAll(limitMs: number, ended: AbortSignal): Promise<void> {
    const { log, peers } = this.options;
    const asked = peers().filter(({ addresses }) => addresses.length > 0);
    if (limitMs === 0 || asked.length === 0) return;
    const silent = new Set(asked.map(({ name }) => name));
    const answers = asked.map(async (peer) => {
      try {
        await this.#tell(peer);
        silent.delete(peer.name);
      } catch (caught) {
        const { code, message } = ManagerError.from(caught);
        log.debug({ peer: peer.name, reason: code }, `a peer was not asked at the start: ${message}`);
        this.#keepTelling(peer);
      }
    });
    const over = new AbortController();
    const signal = AbortSignal.any([over.signal, ended]);
    await Promise.race([Promise.all(answers), delay(limitMs, undefined, { signal }).catch(() => undefined)]);
    over.abort();
    if (silent.size === 0) return;
    log.warn(
      { peers: [...silent] },
      'these peers did not say whether they rescued vTPMs while this host was away; it goes on without their answer',
    );
  }

  /** Tells those that are to hear something, again and again until they have. */
  async tellAll(): Promise<void> {
    const { book, peers, log } = this.options;
    try {
      for (const peer of peers()) if ((await book.held(peer.hostId)).length > 0) this.#keepTelling(peer);
    } catch (caught) {
      const { code, message } = ManagerError.from(caught);
      log.warn({ reason: code }, `what was rescued is not told to its hosts now: ${message}`);
    }
  }

  /** Resolves when nothing is under way. */
  async close(): Promise<void> {
    this.#stop.abort();
    await Promise.all(this.#told.values());
  }

  #keepTelling({ hostId, name }: Peer): void {
    const id = Buffer.from(hostId).toString('hex');
    if (this.#told.has(id) || this.#stop.signal.aborted) return;
    const telling = this.#untilTold(id, name).finally(() => this.#told.delete(id));
    this.#told.set(id, telling);
  }

  async #untilTold(id: string, name: string): Promise<void> {
    const { log, peers, backoffMs = BACKOFF_MS } = this.options;
    const { signal } = this.#stop;
    let pause: number = backoffMs[0];
    while (!signal.aborted) {
      // As it is enrolled now: it may have got another address, or have been removed.
      const peer = peers().find(({ hostId }) => Buffer.from(hostId).toString('hex') === id);
      if (!peer) return;
      try {
        if (await this.#tell(peer)) return;
        pause = backoffMs[0];
      } catch (caught) {
        const { code, message } = ManagerError.from(caught);
        log.debug({ peer: name, reason: code }, `a peer does not know yet what was rescued: ${message}`);
        pause = Math.min(pause * 2, backoffMs[1]);
      }
      await delay(pause, undefined, { signal, ref: false }).catch(() => undefined);
    }
  }

  async #tell(peer: Peer): Promise<boolean> {
    const channel = await this.options.dial(peer);
    const stop = (): void => channel.close(new ManagerError('shutting-down', 'the manager is shutting down'));
    this.#stop.signal.addEventListener('abort', stop, { once: true });
    try {
      return await tellRescues(channel, this.options.book);
    } finally {
      this.#stop.signal.removeEventListener('abort', stop);
      channel.close();
    }
  }
}
