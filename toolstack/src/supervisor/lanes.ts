import { ToolstackError } from '../error.js';

/** What at most so many do at a time; the others have their turn in the order in which they came. */
export class Lanes {
  #free: number;
  readonly #queue = new Set<() => void>();

  constructor(count: number) {
    this.#free = count;
  }

  /** Resolves when it is one's turn. @returns ends it @throws ToolstackError `busy` where `signal` is aborted before */
  async enter(signal: AbortSignal): Promise<() => void> {
    if (signal.aborted) throw brokenOff();
    if (this.#free > 0) this.#free -= 1;
    else await this.#turn(signal);
    let isOver = false;
    return () => {
      if (isOver) return;
      isOver = true;
      this.#leave();
    };
  }

  #turn(signal: AbortSignal): Promise<void> {
    return new Promise((resolve, reject) => {
      const begin = (): void => {
        signal.removeEventListener('abort', giveUp);
        resolve();
      };
      const giveUp = (): void => {
        this.#queue.delete(begin);
        reject(brokenOff());
      };
      signal.addEventListener('abort', giveUp, { once: true });
      this.#queue.add(begin);
    });
  }

  #leave(): void {
    const [next] = this.#queue;
    if (!next) {
      this.#free += 1;
      return;
    }
    this.#queue.delete(next);
    next();
  }
}

function brokenOff(): ToolstackError {
  return new ToolstackError('busy', 'no worker is made for it any more; try again in a moment');
}
