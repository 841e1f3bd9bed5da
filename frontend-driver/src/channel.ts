import type { FrontendError } from './error.js';

export interface TransmitOptions {
  /** 0 unless given. @throws FrontendError `locality` where the channel cannot carry it */
  readonly locality?: number;
  /** Gives the command up; what becomes of one that is on its way depends on the channel. */
  readonly signal?: AbortSignal;
  /** Milliseconds from this call, time in the queue included. */
  readonly deadline?: number;
}

/** A way to one vTPM: a raw connection, a ring, a device. */
export interface TpmChannel {
  /**
   * Sends one whole TPM command and returns its answer, at most 4096 bytes, whatever its response code.
   * @throws FrontendError `bad-command` and `locality` before anything is sent; `aborted`, `deadline`, `protocol`,
   * `closed`, `lost` as their names say
   */
  transmit(command: Uint8Array, options?: TransmitOptions): Promise<Buffer>;
  /** Whether a command that runs can be given up, and the channel goes on. */
  readonly canCancel: boolean;
  /** Settles, never rejects, when the channel is over, with the reason. */
  readonly ended: Promise<FrontendError>;
  /** Ends the channel. Commands that have no answer yet are rejected with `closed`. */
  close(): Promise<void>;
}
