import type { CallEnd } from 'vtpm-proto/grpc-call';
import { VtpmdError } from '../error.js';

/** Status codes of gRPC that mean "not now": the link is held to be lost and everything waits. */
const TRANSIENT: ReadonlySet<number> = new Set([
  1, // CANCELLED
  2, // UNKNOWN
  4, // DEADLINE_EXCEEDED
  8, // RESOURCE_EXHAUSTED
  13, // INTERNAL
  14, // UNAVAILABLE
  15, // DATA_LOSS: the store needs its operator; the running TPM is still the newest copy
]);

/**
 * What a call ends with: undefined for OK, `refused` where trying again cannot help, otherwise `link-lost`. Both carry the
 * manager's own reason, where it gave one.
 */
export function refusalOf({ code, message, reason }: CallEnd & { kind: 'status' }): VtpmdError | undefined {
  if (code === 0) return undefined;
  return new VtpmdError(TRANSIENT.has(code) ? 'link-lost' : 'refused', message, {
    ...(reason !== undefined && { managerReason: reason }),
  });
}
