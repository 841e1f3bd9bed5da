import { once } from 'node:events';
import type { IncomingMessage, ServerResponse } from 'node:http';
import type { Readable } from 'node:stream';
import { readBody } from 'vtpm-common';
import { ManagerError, type ManagerErrorCode } from '../error.js';
import { wipe } from '../keys/index.js';
import type { JsonAnswer } from './route.js';

const MAX_BODY_BYTES = 64 * 1024;
const MAX_KEYS = 16;

const STATUS: Partial<Record<ManagerErrorCode, number>> = {
  'bad-request': 400,
  'too-large': 413,
  'unknown-vtpm': 404,
  'unknown-image': 404,
  'unknown-migration': 404,
  'unknown-call': 404,
  'wrong-method': 405,
  'unknown-peer': 404,
  busy: 409,
  'peer-exists': 409,
  'peer-ek': 409,
  'peer-ak': 409,
  'peer-unattested': 409,
  'newer-format': 409,
  retired: 409,
  stale: 409,
  'platform-policy': 409,
  'wrong-manager': 409,
  'in-doubt': 409,
  moved: 409,
  'not-fenced': 409,
  'lives-here': 409,
  locked: 503,
  'shutting-down': 503,
  'audit-corrupt': 500,
  'store-full': 507,
};

export function sendJson(response: ServerResponse, { status, body }: JsonAnswer): void {
  const bytes = Buffer.from(`${JSON.stringify(body)}\n`);
  response.writeHead(status, { 'content-type': 'application/json', 'content-length': bytes.length });
  response.end(bytes);
}

/**
 * What is refused with its first chunk is refused in full; later the connection breaks, so that no part passes for all. For
 * a reader that is gone nothing more is asked of `chunks`.
 */
export async function sendStream(
  response: ServerResponse,
  type: string,
  chunks: AsyncIterable<string | Buffer>,
): Promise<void> {
  const gone = new AbortController();
  response.once('close', () => gone.abort());
  for await (const chunk of chunks) {
    if (!response.headersSent) response.writeHead(200, { 'content-type': type });
    if (response.destroyed) return;
    if (!response.write(chunk)) {
      await once(response, 'drain', { signal: gone.signal }).catch(() => undefined);
    }
  }
  response.end();
}

export function statusOf({ code }: ManagerError): number {
  return STATUS[code] ?? 500;
}

export function errorAnswer(error: ManagerError): JsonAnswer {
  return {
    status: statusOf(error),
    body: { error: { code: error.code, message: error.message } },
  };
}

/** @returns the body, in the only copy of it; the caller wipes it where it is secret @throws ManagerError `too-large` */
export async function readBytes(request: Readable, limit: number): Promise<Buffer> {
  const body = await readBody(request, limit);
  if (!body) throw new ManagerError('too-large', `a request body has at most ${limit} bytes`);
  return body;
}

/** @returns the JSON object of the body @throws ManagerError `too-large`, `bad-request` */
export async function readJson(
  request: IncomingMessage,
  limit = MAX_BODY_BYTES,
): Promise<Record<string, unknown>> {
  const body = await readBytes(request, limit);
  let value: unknown;
  try {
    value = JSON.parse(body.toString('utf8'));
  } catch (cause) {
    throw new ManagerError('bad-request', 'the request body is not JSON', { cause });
  } finally {
    // Of the password of an owner.
    wipe(body);
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw new ManagerError('bad-request', 'the request body must be one JSON object');
  }
  if (Object.keys(value).length > MAX_KEYS) {
    throw new ManagerError('bad-request', 'the request body has too many keys');
  }
  return value as Record<string, unknown>;
}
