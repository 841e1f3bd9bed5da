import type { Peer, PeerMessage } from 'vtpm-proto';
import type { ManagerError } from '../error.js';

/**
 * One conversation with another host over mutual TLS 1.3: both TLS keys are proven, nothing more. The two ends of a
 * migration run on it, and it is the same at both.
 */
export interface PeerChannel {
  /** Whose TLS key it is, as it is enrolled now. @throws ManagerError `unknown-peer` where it was removed */
  readonly peer: Peer;
  /** SHA-256 over both TLS keys, in the order client, server; 32 bytes. */
  readonly binding: Buffer;
  /** Bytes of messages, with what gRPC puts around them. */
  readonly sentBytes: number;
  readonly receivedBytes: number;
  /**
   * Resolves when the message is on its way and there is room for the next.
   * @throws ManagerError `too-large`; `peer-closed` or what it was closed with
   */
  send(message: PeerMessage): Promise<void>;
  /**
   * The next message, in their order. What came before the channel was closed is still given out.
   * @throws ManagerError `peer-late` where none came; the channel is of use still. `peer-closed` or what it was closed with:
   * with the other end's reason where it gave one
   */
  receive(deadlineMs: number): Promise<PeerMessage>;
  /** Ends it at both ends; again it does nothing. The other end hears code and sentence of `error`. */
  close(error?: ManagerError): void;
  /** Resolves when it is closed, from whichever end. Never rejects. */
  readonly closed: Promise<ManagerError>;
}
