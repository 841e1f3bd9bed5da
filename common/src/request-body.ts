import type { Readable } from 'node:stream';

/**
 * Reads a request to its end, also where it is too large: whoever writes first and reads then gets the answer, not EPIPE.
 * @param limit bytes; what comes after them is let pass, never kept
 * @returns the body, in the only copy of it; the caller wipes it where it is secret. Undefined where it is larger
 */
export async function readBody(request: Readable, limit: number): Promise<Buffer | undefined> {
  const chunks: Buffer[] = [];
  let length = 0;
  try {
    for await (const chunk of request as AsyncIterable<Buffer>) {
      length += chunk.length;
      if (length <= limit) chunks.push(chunk);
      else chunk.fill(0);
    }
    return length <= limit ? Buffer.concat(chunks) : undefined;
  } finally {
    for (const chunk of chunks) chunk.fill(0);
  }
}
