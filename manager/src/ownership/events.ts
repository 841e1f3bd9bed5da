/** What happens to vTPMs, for the admin plane's event stream. */
export interface VtpmEvent {
  readonly type: 'loaded' | 'saved' | 'link-up' | 'link-lost' | 'fenced' | 'retired';
  readonly id: string;
  readonly epoch: bigint;
  readonly generation: bigint;
}

/** Hands each event to every listener. A listener must not throw. */
export class VtpmEvents {
  /** Each with what it wants to be told at the end. */
  readonly #listeners = new Map<(event: VtpmEvent) => void, () => void>();

  /** @param onEnd called where no event can come any more @returns the function that ends the subscription */
  subscribe(listener: (event: VtpmEvent) => void, onEnd: () => void = () => undefined): () => void {
    this.#listeners.set(listener, onEnd);
    return () => this.#listeners.delete(listener);
  }

  emit(event: VtpmEvent): void {
    for (const listener of this.#listeners.keys()) listener(event);
  }

  end(): void {
    for (const onEnd of this.#listeners.values()) onEnd();
    this.#listeners.clear();
  }
}
