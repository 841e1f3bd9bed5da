import { HEADER, type Transport, wrapped } from './transport.js';

/**
 * What a log may say of a command: numbers of its header and of its answer's. Never a byte of a body, where
 * authorisations, secrets and keys are.
 */
export interface ObservedExchange {
  /** TPM_CC; undefined where fewer than 10 bytes were sent. */
  readonly commandCode: number | undefined;
  /** Bytes, header included. */
  readonly commandSize: number;
  /** Bytes, header included; undefined where no answer came. */
  readonly responseSize: number | undefined;
  /** TPM_RC as it came: see `parseResponseCode`; undefined where no answer came. */
  readonly responseCode: number | undefined;
  /** Nanoseconds of `process.hrtime.bigint()`, when the command was handed to the transport. */
  readonly started: bigint;
  /** Nanoseconds until the answer or the failure. */
  readonly duration: bigint;
}

export type ExchangeObserver = (exchange: ObservedExchange) => void;

/**
 * Tells `observer` of every command after its answer or failure. Given to `createTpm`, it sees each sending of a command
 * that the TPM asked to send again. What the observer throws, or rejects with, is dropped: a log does not break commands.
 */
export function intercepted(transport: Transport, observer: ExchangeObserver): Transport {
  return {
    ...wrapped(transport),
    async transmit(command, signal) {
      const started = process.hrtime.bigint();
      // Before sending: the caller may wipe the command as soon as the answer is here.
      const sent = { commandCode: codeOf(command), commandSize: command.length };
      const tell = (response: Buffer | undefined): void =>
        notify(observer, {
          ...sent,
          responseSize: response?.length,
          responseCode: response === undefined ? undefined : codeOf(response),
          started,
          duration: process.hrtime.bigint() - started,
        });
      let response: Buffer;
      try {
        response = await transport.transmit(command, signal);
      } catch (error) {
        tell(undefined);
        throw error;
      }
      tell(response);
      return response;
    },
  };
}

function codeOf(message: Uint8Array): number | undefined {
  if (message.length < HEADER) return undefined;
  return new DataView(message.buffer, message.byteOffset, HEADER).getUint32(6);
}

function notify(observer: ExchangeObserver, exchange: ObservedExchange): void {
  try {
    // An async function is an observer too, as far as types go.
    const returned: unknown = observer(Object.freeze(exchange));
    if (returned instanceof Promise) returned.catch(() => undefined);
  } catch {}
}
