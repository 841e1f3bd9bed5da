import { setTimeout as delay } from 'node:timers/promises';
import { barrier, type Logger } from 'vtpm-common';
import { bytesEqual, uuidToBytes } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import type { UnsettledArrival } from '../ownership/census.js';
import { LIMITS_MS, SETTLE_AFTER_MS } from './limits.js';
import type { Arrivals, Host } from './ports.js';
import { Talk } from './talk.js';

export interface SettlerParts {
  readonly host: Host;
  readonly arrivals: Arrivals;
  /** Its session is open still, and will say so by itself. */
  readonly isLive: (migrationId: Uint8Array) => boolean;
  readonly log: Logger;
  /** For tests: other pauses. */
  readonly pausesMs?: readonly number[] | undefined;
}

/**
 * Asks sources whether they have written their tombstones, where the line broke before they could say so. Nothing waits for
 * it: it is so that what was decided need not be remembered for ever.
 */
export class Settler {
  readonly #ended = new AbortController();
  #wake = new AbortController();
  #running: Promise<void> | undefined;
  #round = 0;

  constructor(private readonly parts: SettlerParts) {}

  start(): void {
    this.#running = this.#run();
  }

  /** Something may be unsettled: the next round comes soon. */
  notice(): void {
    this.#round = 0;
    this.#wake.abort();
  }

  async stop(): Promise<void> {
    this.#ended.abort();
    this.#wake.abort();
    await this.#running;
  }

  async #run(): Promise<void> {
    for (;;) {
      const pauses = this.parts.pausesMs ?? SETTLE_AFTER_MS;
      const pause = pauses[Math.min(this.#round, pauses.length - 1)];
      await delay(pause, undefined, { signal: this.#wake.signal, ref: false }).catch(() => undefined);
      if (this.#ended.signal.aborted) return;
      if (this.#wake.signal.aborted) {
        this.#wake = new AbortController();
        continue;
      }
      this.#round += 1;
      for (const arrival of this.#unsettled()) {
        if (this.#ended.signal.aborted) return;
        if (this.parts.isLive(arrival.migrationId)) continue;
        await this.#askOne(arrival).catch((error: unknown) => {
          const { code, message } = ManagerError.from(error);
          this.parts.log.debug(
            { vtpm: arrival.vtpmUuid, reason: code },
            `a migration is not settled: ${message}`,
          );
        });
      }
    }
  }

  #unsettled(): UnsettledArrival[] {
    try {
      return this.parts.arrivals.unsettled();
    } catch (error) {
      const { code, message } = ManagerError.from(error);
      this.parts.log.error({ reason: code }, `which migrations are not settled cannot be told: ${message}`);
      return [];
    }
  }

  async #askOne({ migrationId, vtpmUuid, source }: UnsettledArrival): Promise<void> {
    const { host, arrivals } = this.parts;
    const channel = await host.dial(host.peer(source));
    const stop = (): void => channel.close();
    this.#ended.signal.addEventListener('abort', stop, { once: true });
    try {
      const talk = new Talk(channel, 'destination');
      await talk.send('UNSETTLED', { migrationId, vtpmUuid: uuidToBytes(vtpmUuid) });
      const { value } = await talk.receive('SETTLED', LIMITS_MS.settling);
      if (!bytesEqual(value.migrationId, migrationId)) return;
      barrier('migrate.destination.settle');
      await arrivals.settled(migrationId, source);
      barrier('migrate.destination.settled');
    } finally {
      this.#ended.signal.removeEventListener('abort', stop);
      channel.close();
    }
  }
}
