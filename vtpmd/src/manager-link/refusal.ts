import type { IncomingHttpHeaders } from 'node:http2';
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
 * What a call's trailers say: undefined for OK, `refused` where trying again cannot help, otherwise `link-lost`. Both
 * carry the manager's own reason, where it gave one.
 */
export function refusalOf(trailers: IncomingHttpHeaders): VtpmdError | undefined {
  const status = Number(trailers['grpc-status'] ?? 2);
  if (status === 0) return undefined;
  const message = percentDecoded(String(trailers['grpc-message'] ?? `gRPC status ${status}`));
  const reason = trailers['vtpm-reason'];
  return new VtpmdError(TRANSIENT.has(status) ? 'link-lost' : 'refused', message, {
    ...(typeof reason === 'string' && { managerReason: reason }),
  });
}

/** gRPC over HTTP/2, "Status-Message": percent-encoded UTF-8; what is not decodable is shown as it is. */
function percentDecoded(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}
