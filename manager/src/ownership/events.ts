import type { MigrateMode, Verdict } from 'vtpm-proto';

/** What happens to a vTPM here. */
export interface VtpmChange {
  readonly type:
    | 'loaded'
    | 'saved'
    | 'link-up'
    | 'link-lost'
    | 'fenced'
    | 'retired'
    // Nobody runs it here any more; it goes on here after all; it lives elsewhere; it lives here.
    | 'departing'
    | 'stayed'
    | 'moved'
    | 'arrived';
  readonly id: string;
  readonly epoch: bigint;
  readonly generation: bigint;
}

/** Another host sends a vTPM: the toolstack is to accept it or refuse it. */
export interface IncomingEvent {
  readonly type: 'incoming';
  /** Hex, 16 bytes. */
  readonly migration: string;
  readonly id: string;
  readonly vmUuid: string;
  readonly vmRunId: string;
  /** At the source now. */
  readonly epoch: bigint;
  readonly generation: bigint;
  readonly mode: MigrateMode;
  readonly from: { readonly name: string; readonly hostId: string };
  /** Of the source's toolstack, for this one. */
  readonly description: string;
  readonly dryRun: boolean;
}

/** It is decided where a vTPM lives, and durable here; at the destination also where it was never decided and cannot be any more. */
export interface MigrationEvent {
  readonly type: 'migration';
  readonly migration: string;
  readonly id: string;
  readonly role: 'source' | 'destination';
  readonly verdict: Verdict;
  /** Name of the other host. */
  readonly peer: string;
}

/** For the admin plane's event stream. */
export type VtpmEvent = VtpmChange | IncomingEvent | MigrationEvent;

/** Hands each event to every listener. A listener must not throw. */
export class VtpmEvents {
  /** Each with what it wants to be told at the end. */
  readonly #listeners = new Map<(event: VtpmEvent) => void, () => void>();
  #followers = 0;

  /** @param onEnd called where no event can come any more @returns the function that ends the subscription */
  subscribe(listener: (event: VtpmEvent) => void, onEnd: () => void = () => undefined): () => void {
    this.#listeners.set(listener, onEnd);
    return () => this.#listeners.delete(listener);
  }

  /** `subscribe` for somebody outside of the manager. */
  follow(listener: (event: VtpmEvent) => void, onEnd?: () => void): () => void {
    const unsubscribe = this.subscribe(listener, onEnd);
    this.#followers += 1;
    return () => {
      unsubscribe();
      this.#followers -= 1;
    };
  }

  get isFollowed(): boolean {
    return this.#followers > 0;
  }

  emit(event: VtpmEvent): void {
    for (const listener of this.#listeners.keys()) listener(event);
  }

  end(): void {
    for (const onEnd of this.#listeners.values()) onEnd();
    this.#listeners.clear();
  }
}
