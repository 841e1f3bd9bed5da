import { TpmError } from '../error.js';

/** The way to a TPM: one command out, one answer back. The caller has one command under way at a time. */
export interface Transport {
  /**
   * The answer is the caller's, who wipes it; so is the command, which is wiped as soon as this settles.
   * @param signal for wrappers that wait before they send: they stop, and throw `aborted` where the TPM has executed
   * nothing. A transport itself need not look at it: what was sent is given up with `cancel` or `close`.
   * @throws TpmError `transport`; then nothing more can be sent over it
   */
  transmit(command: Uint8Array, signal?: AbortSignal): Promise<Buffer>;
  /**
   * Asks the TPM to give up the command under way; without one, nothing happens. The command still gets its answer:
   * TPM_RC_CANCELED, or the one it would have had where the TPM was faster or does not stop it. Only transports that have
   * a way to ask have this method.
   * @throws TpmError `transport` where the TPM could not be asked
   */
  cancel?(): Promise<void>;
  /** Ends it. A command under way is rejected with `transport`. */
  close(): Promise<void>;
}

/** Header of every command and answer: tag, size, code. */
export const HEADER = 10;

/** No command or answer is longer. TPMs say 4096 for TPM_PT_MAX_RESPONSE_SIZE; the field itself knows no limit. */
export const MAX_MESSAGE = 16384;

export function transportError(message: string, cause?: unknown): TpmError {
  return new TpmError('transport', message, { cause });
}

/** What every wrapper hands on. It can cancel where the transport in it can. */
export function wrapped(transport: Transport): Pick<Transport, 'cancel' | 'close'> {
  const close = (): Promise<void> => transport.close();
  return transport.cancel === undefined ? { close } : { close, cancel: async () => transport.cancel?.() };
}

/** For use where nothing was sent, or the TPM said that it executed nothing. */
export function abortedError(signal: AbortSignal): TpmError {
  const message = 'the command was given up before the TPM executed anything of it';
  return new TpmError('aborted', message, { cause: signal.reason });
}

/** @throws TpmError `aborted` */
export function throwIfAborted(signal: AbortSignal | undefined): void {
  if (signal?.aborted) throw abortedError(signal);
}

/**
 * The announced size of an answer, or undefined where the header is not whole yet.
 * @throws Error with what is wrong with it
 */
export function announcedSize(received: Buffer, longest: number): number | undefined {
  if (received.length < HEADER) return undefined;
  const size = received.readUInt32BE(2);
  if (size < HEADER || size > longest) throw new Error(`an answer of ${size} bytes was announced`);
  return size;
}
