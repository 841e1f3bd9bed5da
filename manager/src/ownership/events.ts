/** What happens to vTPMs, for the admin plane's event stream. */
export interface VtpmEvent {
  readonly type: 'loaded' | 'saved' | 'link-up' | 'link-lost' | 'fenced' | 'retired';
  readonly id: string;
  readonly epoch: bigint;
  readonly generation: bigint;
}

/** Hands each event to every listener. A listener must not throw. */
export class VtpmEvents {
  readonly #listeners = new Set<(event: VtpmEvent) => void>();

  /** @returns the function that ends the subscription */
  subscribe(listener: (event: VtpmEvent) => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  emit(event: VtpmEvent): void {
    for (const listener of this.#listeners) listener(event);
  }
}
