import { TpmError } from '../error.js';

/** The way to a TPM: one command out, one answer back. The caller has one command under way at a time. */
export interface Transport {
  /** @throws TpmError `transport`; then nothing more can be sent over it */
  transmit(command: Uint8Array): Promise<Buffer>;
  close(): Promise<void>;
}

/** Header of every command and answer: tag, size, code. */
export const HEADER = 10;

/** No command or answer is longer. TPMs say 4096 for TPM_PT_MAX_RESPONSE_SIZE; the field itself knows no limit. */
export const MAX_MESSAGE = 16384;

export function transportError(message: string, cause?: unknown): TpmError {
  return new TpmError('transport', message, { cause });
}
