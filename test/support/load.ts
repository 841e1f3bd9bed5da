import { connectGuest, type Guest } from 'vtpm-quickstart/guest';

/** What a guest knows of its counter: how often it asked for a step, how often it was told so, the highest value it saw. */
export interface Tally {
  attempted: bigint;
  acknowledged: bigint;
  seen: bigint;
}

/**
 * A guest that increments a counter and reads it back without pause, until its connection breaks or `stop` is called.
 * Each step is durable before it is answered, so whatever the tally says must be there after any crash.
 */
export class GuestLoad {
  #isStopping = false;
  readonly #guest: Guest;
  readonly finished: Promise<void>;

  private constructor(
    guest: Guest,
    readonly tally: Tally,
  ) {
    this.#guest = guest;
    this.finished = this.#run();
  }

  static async begin(door: string, tally: Tally): Promise<GuestLoad> {
    return new GuestLoad(await connectGuest(door), tally);
  }

  async stop(): Promise<void> {
    this.#isStopping = true;
    await this.finished;
  }

  async #run(): Promise<void> {
    try {
      while (!this.#isStopping) {
        this.tally.attempted++;
        await this.#guest.increment();
        this.tally.acknowledged++;
        const value = await this.#guest.counter();
        if (value > this.tally.seen) this.tally.seen = value;
      }
    } catch {
      // The connection broke, as it must when the worker is gone.
    } finally {
      await this.#guest.close().catch(() => undefined);
    }
  }
}
