import { CODE_BYTES, type CommandShape, MAX_CONTENT_BYTES, shapeOf } from './commands.js';

/** A request that is wholly there. */
export interface ControlRequest {
  readonly shape: CommandShape;
  /** Behind the command code; as long as the command's body, at least. */
  readonly body: Buffer;
  /** What follows the body, where the command has that. */
  readonly content: Buffer;
}

export type Reading =
  | { readonly kind: 'request'; readonly request: ControlRequest }
  /** More is to come. `least`: so many bytes at least, 0 where that is not known yet. */
  | { readonly kind: 'partial'; readonly least: number }
  /** What it is cannot be done; `shape` where that much is known. */
  | { readonly kind: 'unknown' }
  | { readonly kind: 'malformed'; readonly shape: CommandShape }
  /** Its content is longer than any may be, so nobody will find its end. */
  | { readonly kind: 'endless'; readonly shape: CommandShape };

/**
 * Reads what was received as one request. Framing is "one receive, one request": clients wait for each answer, and pad
 * some bodies, so what is there beyond a request belongs to it.
 */
export function readRequest(received: Buffer): Reading {
  if (received.length < CODE_BYTES) return { kind: 'partial', least: CODE_BYTES };
  const shape = shapeOf(received.readUInt32BE(0));
  if (!shape) return { kind: 'unknown' };
  const bodyEnd = CODE_BYTES + shape.body;
  if (received.length < bodyEnd) return { kind: 'partial', least: bodyEnd };
  const { contentLengthAt } = shape;
  const contentLength = contentLengthAt === undefined ? 0 : received.readUInt32BE(contentLengthAt);
  if (contentLength > MAX_CONTENT_BYTES) return { kind: 'endless', shape };
  const end = bodyEnd + contentLength;
  if (received.length < end) return { kind: 'partial', least: end };
  if (shape.isExact && received.length !== end) return { kind: 'malformed', shape };
  const body = received.subarray(CODE_BYTES, bodyEnd);
  return { kind: 'request', request: { shape, body, content: received.subarray(bodyEnd, end) } };
}

/** A response of the command's full size: the result, then as many words as are given, then zeros. */
export function response(shape: CommandShape | undefined, result: number, ...words: number[]): Buffer {
  const out = Buffer.alloc(shape?.response ?? 4);
  out.writeUInt32BE(result, 0);
  words.forEach((word, index) => {
    out.writeUInt32BE(word >>> 0, 4 + 4 * index);
  });
  return out;
}
