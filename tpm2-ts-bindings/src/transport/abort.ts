import { type Transport, throwIfAborted, transportError, wrapped } from './transport.js';

/**
 * Gives a command up when its signal says so: by `cancel` where the transport can ask the TPM, and then the wait goes on
 * for the answer that still comes. Otherwise the wait ends, and with it the transport: the late answer would be taken for
 * that of the next command.
 */
export function abortable(transport: Transport): Transport {
  return {
    ...wrapped(transport),
    transmit(command, signal) {
      if (signal === undefined) return transport.transmit(command);
      return new Promise((resolve, reject) => {
        throwIfAborted(signal);
        let isOver = false;
        const giveUp = (cause: unknown): void => {
          // A request to cancel may be refused because the command is over.
          if (isOver) return;
          reject(
            transportError(
              'a command was given up while the TPM worked on it; connect anew for the next one',
              cause,
            ),
          );
          // What closing could complain about says no more than that it is closed.
          transport.close().catch(() => undefined);
        };
        const onAbort = (): void => {
          if (transport.cancel === undefined) giveUp(signal.reason);
          else transport.cancel().catch(giveUp);
        };
        signal.addEventListener('abort', onAbort, { once: true });
        transport
          .transmit(command, signal)
          .finally(() => {
            isOver = true;
            signal.removeEventListener('abort', onAbort);
          })
          .then(resolve, reject);
      });
    },
  };
}
