import type { IncomingMessage, ServerResponse } from 'node:http';
import { ManagerError, type ManagerErrorCode } from '../error.js';
import type { JsonAnswer } from './route.js';

const MAX_BODY_BYTES = 64 * 1024;
const MAX_KEYS = 16;

const STATUS: Partial<Record<ManagerErrorCode, number>> = {
  'bad-request': 400,
  'too-large': 413,
  'unknown-vtpm': 404,
  'unknown-image': 404,
  'unknown-call': 404,
  'wrong-method': 405,
  busy: 409,
  retired: 409,
  stale: 409,
  'platform-policy': 409,
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

export function statusOf({ code }: ManagerError): number {
  return STATUS[code] ?? 500;
}

export function errorAnswer(error: ManagerError): JsonAnswer {
  return {
    status: statusOf(error),
    body: { error: { code: error.code, message: error.message } },
  };
}

/** @returns the JSON object of the body @throws ManagerError `too-large`, `bad-request` */
export async function readJson(
  request: IncomingMessage,
  limit = MAX_BODY_BYTES,
): Promise<Record<string, unknown>> {
  const chunks: Buffer[] = [];
  let length = 0;
  for await (const chunk of request as AsyncIterable<Buffer>) {
    length += chunk.length;
    if (length > limit) {
      throw new ManagerError('too-large', `a request body has at most ${limit} bytes`);
    }
    chunks.push(chunk);
  }
  let value: unknown;
  try {
    value = JSON.parse(Buffer.concat(chunks).toString('utf8'));
  } catch (cause) {
    throw new ManagerError('bad-request', 'the request body is not JSON', { cause });
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw new ManagerError('bad-request', 'the request body must be one JSON object');
  }
  if (Object.keys(value).length > MAX_KEYS) {
    throw new ManagerError('bad-request', 'the request body has too many keys');
  }
  return value as Record<string, unknown>;
}
