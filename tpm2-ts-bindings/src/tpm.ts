import { wipe } from './bytes.js';
import type { Command, HandleArguments, HandleNames } from './command.js';
import { TpmError } from './error.js';
import { build, collect, parse } from './pipeline.js';
import { Session } from './session.js';
import { abortable } from './transport/abort.js';
import { type RetryOptions, retrying } from './transport/retry.js';
import { abortedError, type Transport, throwIfAborted } from './transport/transport.js';

export interface RunOptions {
  /**
   * Gives the command up. One that waits is dropped with `aborted`: neither the TPM nor a session noticed it. One under way
   * is cancelled where the transport can ask for it, and then ends as the TPM says: with TPM_RC_CANCELED, or as if nothing
   * had been asked (TPMs may stop only key generation). Otherwise the wait ends with `transport`, for this command and all
   * after it.
   */
  readonly signal?: AbortSignal;
}

/** A TPM. Commands are executed one after the other in the order they were asked for. */
export interface Tpm {
  /**
   * Executes a command.
   * @param handles one entry per handle of the command, those that need it with an authorisation
   * @param sessions further sessions, which only encrypt or authenticate; three in all
   * @throws TpmError
   */
  run<H extends HandleNames, P, R>(
    command: Command<H, P, R>,
    handles: HandleArguments<H>,
    params: P,
    sessions?: readonly Session[],
    options?: RunOptions,
  ): Promise<R>;
  /** Waits for the commands under way, then closes the transport. */
  close(): Promise<void>;
}

/** A client on a transport, which it owns from now on. */
export function createTpm(transport: Transport, retry: RetryOptions = {}): Tpm {
  return new QueuedTpm(retrying(abortable(transport), retry));
}

class QueuedTpm implements Tpm {
  #last: Promise<unknown> = Promise.resolve();
  constructor(private readonly transport: Transport) {}

  run<H extends HandleNames, P, R>(
    command: Command<H, P, R>,
    handles: HandleArguments<H>,
    params: P,
    sessions: readonly Session[] = [],
    { signal }: RunOptions = {},
  ): Promise<R> {
    let hasBegun = false;
    // Nonces roll with each command, so a command is built only when its turn has come.
    const turn = this.#last.then(() => {
      throwIfAborted(signal);
      hasBegun = true;
      return this.#execute(command, handles, params, sessions, signal);
    });
    // Without the result, which may be a secret that the caller wipes and forgets.
    this.#last = turn.then(
      () => undefined,
      () => undefined,
    );
    if (signal === undefined) return turn;
    // Who gives up a command that waits is not kept until its turn.
    return new Promise((resolve, reject) => {
      const onAbort = (): void => {
        if (!hasBegun) reject(abortedError(signal));
      };
      if (signal.aborted) onAbort();
      signal.addEventListener('abort', onAbort, { once: true });
      turn.finally(() => signal.removeEventListener('abort', onAbort)).then(resolve, reject);
    });
  }

  async close(): Promise<void> {
    await this.#last;
    await this.transport.close();
  }

  async #execute<H extends HandleNames, P, R>(
    command: Command<H, P, R>,
    handles: HandleArguments<H>,
    params: P,
    extra: readonly Session[],
    signal: AbortSignal | undefined,
  ): Promise<R> {
    const { entities, uses } = collect(command, handles, extra);
    const used = uses.flatMap((use) => (use.by === 'password' ? [] : [use.by]));
    const request = build(command, entities, uses, params);
    let response: Buffer | undefined;
    try {
      try {
        response = await this.transport.transmit(request.bytes, signal);
      } finally {
        wipe(request.bytes);
      }
      const newAuth = command.newAuth(params, entities[0]);
      const result = parse(command, uses, request, response, newAuth);
      for (const entity of entities) {
        if (entity instanceof Session && command.policyEffect !== undefined)
          entity.policyEffect(command.policyEffect);
      }
      return result;
    } catch (error) {
      // A command that the TPM refused or did not get leaves its sessions as they were; after any other error the two
      // sides may disagree.
      const isInStep = error instanceof TpmError && (error.code === 'tpm' || error.code === 'aborted');
      if (!isInStep) for (const session of used) session.poison();
      throw error;
    } finally {
      wipe(response);
    }
  }
}
