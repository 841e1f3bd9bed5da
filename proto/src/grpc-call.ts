import type { ClientHttp2Session, ClientHttp2Stream, IncomingHttpHeaders } from 'node:http2';
import { MessageReader } from './grpc-wire.js';

/** How a call ended: with the status of its server, without one, or with something that is no gRPC. */
export type CallEnd =
  | { readonly kind: 'status'; readonly code: number; readonly message: string; readonly reason?: string }
  | { readonly kind: 'cut'; readonly message: string }
  | { readonly kind: 'unreadable'; readonly cause: unknown };

/**
 * Begins a call of a gRPC server without the gRPC package, which costs more memory than a TPM (PROTOCOL-HTTP2).
 * @throws Error where the session is closed already
 */
export function startCall(session: ClientHttp2Session, path: string): ClientHttp2Stream {
  return session.request({
    ':method': 'POST',
    ':path': path,
    'content-type': 'application/grpc',
    te: 'trailers',
  });
}

/** Calls `onMessage` for each message and `onEnd` once. What `onMessage` throws ends the call. */
export function receiveCall(
  stream: ClientHttp2Stream,
  onMessage: (message: Buffer) => void,
  onEnd: (end: CallEnd) => void,
): void {
  const reader = new MessageReader();
  let end: CallEnd = { kind: 'cut', message: 'the link broke' };
  stream.on('response', (headers) => {
    // A call that fails at once has its trailers in the headers.
    if (headers['grpc-status'] !== undefined) end = statusOf(headers);
    else if (headers[':status'] !== 200) end = { kind: 'cut', message: `HTTP status ${headers[':status']}` };
  });
  stream.on('trailers', (headers) => {
    end = statusOf(headers);
  });
  let failure: CallEnd | undefined;
  stream.on('data', (chunk: Buffer) => {
    if (failure) return;
    try {
      for (const message of reader.push(chunk)) onMessage(message);
    } catch (cause) {
      failure = { kind: 'unreadable', cause };
      stream.close();
    }
  });
  // The server may end a call whose other half, ours, is open. Trailers come before the end.
  stream.on('end', () => stream.close());
  stream.on('error', () => {});
  stream.on('close', () => onEnd(failure ?? end));
}

function statusOf(trailers: IncomingHttpHeaders): CallEnd {
  const code = Number(trailers['grpc-status'] ?? 2);
  const message = percentDecoded(String(trailers['grpc-message'] ?? `gRPC status ${code}`));
  const reason = trailers['vtpm-reason'];
  return { kind: 'status', code, message, ...(typeof reason === 'string' && { reason }) };
}

/** gRPC over HTTP/2, "Status-Message": percent-encoded UTF-8; what is not decodable is shown as it is. */
function percentDecoded(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}
