import { setTimeout as sleep } from 'node:timers/promises';
import { parseResponseCode } from '../response-code.js';
import { HEADER, type Transport, throwIfAborted, wrapped } from './transport.js';

export interface RetryOptions {
  /** Milliseconds before the first further try; each later pause is twice as long, up to `longest`. */
  readonly first?: number;
  readonly longest?: number;
  /** After that many milliseconds of pauses the TPM's answer is passed on. */
  readonly total?: number;
}

/**
 * Sends a command again while the TPM says that it did not execute it and that it may be sent again (RETRY, YIELDED,
 * TESTING, NV_RATE). Never for other codes: a failed authorisation moves the dictionary attack counter. A signal ends the
 * pauses with `aborted`, since nothing was executed until then.
 */
export function retrying(transport: Transport, options: RetryOptions = {}): Transport {
  const { first = 20, longest = 2000, total = 60_000 } = options;
  return {
    ...wrapped(transport),
    async transmit(command, signal) {
      for (let pause = first, waited = 0; ; pause = Math.min(pause * 2, longest)) {
        const response = await transport.transmit(command, signal);
        const asksAgain = response.length === HEADER && parseResponseCode(response.readUInt32BE(6)).retryable;
        if (!asksAgain || waited >= total) return response;
        await sleep(pause, undefined, signal && { signal }).catch(() => throwIfAborted(signal));
        waited += pause;
      }
    },
  };
}
