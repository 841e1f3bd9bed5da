import { chmodSync, rmSync } from 'node:fs';
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http';
import type { Socket } from 'node:net';
import { checkSocketPath, type Logger, peerCredentials, socketFd, VERSION } from 'vtpm-common';
import { ToolstackError, type ToolstackErrorCode } from '../error.js';
import { isolationProfile } from './layers.js';
import type { Supervisor } from './supervisor.js';

export interface SupervisorApi {
  /** No new calls; those under way are answered. */
  close(): Promise<void>;
}

const MAX_BODY_BYTES = 64 * 1024;

/** HTTP and JSON on a unix socket, for root and the supervisor's own user. Errors are `{error: {code, message}}`. */
export async function serveApi(supervisor: Supervisor, path: string, log: Logger): Promise<SupervisorApi> {
  let isClosing = false;
  const server = createServer((request, response) => {
    if (isClosing) {
      send(response, 503, { error: { code: 'busy', message: 'the supervisor is stopping; start it again' } });
    } else {
      void answer(supervisor, request, response, log);
    }
  });
  server.requestTimeout = 10_000;
  server.headersTimeout = 5_000;
  server.maxConnections = 256;
  server.on('connection', refuseStrangers);
  await listen(server, checkSocketPath(path));
  // The next connection may be accepted again; without a handler this one would end the process.
  server.on('error', (error) => log.warn({ socket: path, reason: error.message }, 'a connection was lost'));
  return {
    close: () =>
      new Promise((resolve) => {
        isClosing = true;
        server.close(() => resolve());
        server.closeIdleConnections();
      }),
  };
}

const STATUS: Readonly<Partial<Record<ToolstackErrorCode, number>>> = {
  'bad-request': 400,
  'image-not-allowed': 403,
  'image-changed': 409,
  'unknown-vtpm': 404,
  'name-taken': 409,
  'not-stopped': 409,
  'already-running': 409,
  busy: 409,
  'manager-refused': 502,
  'worker-failed': 502,
  'manager-unreachable': 503,
  locked: 503,
  'layer-missing': 503,
  'store-full': 507,
};

async function answer(
  supervisor: Supervisor,
  request: IncomingMessage,
  response: ServerResponse,
  log: Logger,
): Promise<void> {
  try {
    const { status, body } = await dispatch(supervisor, request);
    send(response, status, body);
  } catch (caught) {
    const error = ToolstackError.from(caught);
    if (error.code === 'internal') log.error({ err: error }, 'a call failed');
    send(response, STATUS[error.code] ?? 500, { error: { code: error.code, message: error.message } });
  }
}

async function dispatch(
  supervisor: Supervisor,
  request: IncomingMessage,
): Promise<{ status: number; body: unknown }> {
  const [, collection, name, verb, ...rest] = pathOf(request).split('/');
  const call = `${request.method} /${collection}${name ? '/:vtpm' : ''}${verb ? `/${verb}` : ''}`;
  const unknown = new ToolstackError(
    'bad-request',
    `there is no call ${request.method} ${pathOf(request).slice(0, 128)}`,
  );
  if (rest.length > 0) throw unknown;
  switch (call) {
    case 'GET /health':
      return { status: 200, body: healthOf(supervisor) };
    case 'GET /image': {
      const { digest, parts, command } = supervisor.image;
      const { argv, env } = command;
      return {
        status: 200,
        body: { digest, parts: parts.map(({ name, sha256, bytes }) => ({ name, sha256, bytes })), argv, env },
      };
    }
    case 'PUT /image': {
      const { digest } = supervisor.refreshImage(await readDigest(request));
      return { status: 200, body: { digest } };
    }
    case 'GET /vtpms':
      return { status: 200, body: { vtpms: supervisor.all().map((vtpm) => vtpm.view()) } };
    case 'POST /vtpms':
      return { status: 201, body: supervisor.create(await readBody(request)).view() };
    case 'GET /vtpms/:vtpm':
      return { status: 200, body: supervisor.find(decoded(name)).view() };
    case 'DELETE /vtpms/:vtpm': {
      const vtpm = supervisor.find(decoded(name));
      await supervisor.remove(vtpm);
      return { status: 200, body: { id: vtpm.entry.id } };
    }
    case 'POST /vtpms/:vtpm/start':
    case 'POST /vtpms/:vtpm/stop': {
      const vtpm = supervisor.find(decoded(name));
      await (verb === 'start' ? vtpm.start() : vtpm.stop());
      return { status: 200, body: vtpm.view() };
    }
    default:
      throw unknown;
  }
}

function healthOf(supervisor: Supervisor): unknown {
  return {
    status: 'ready',
    version: VERSION,
    delegateKey: supervisor.delegateKey.publicKey.toString('hex'),
    managerConnected: supervisor.managerConnected,
    imageDigest: supervisor.image.digest,
    isolationProfile: isolationProfile(),
    pool: supervisor.pool,
    vtpms: supervisor.all().length,
  };
}

function pathOf(request: IncomingMessage): string {
  return (request.url ?? '/').split('?')[0] ?? '/';
}

function decoded(text = ''): string {
  try {
    return decodeURIComponent(text);
  } catch {
    throw new ToolstackError('bad-request', 'the name of the vTPM is not a valid part of a path');
  }
}

/** `{"digest": …}` of the one image that will do, or `{}`. */
async function readDigest(request: IncomingMessage): Promise<string | undefined> {
  const { digest } = ((await readBody(request)) ?? {}) as { digest?: unknown };
  if (digest === undefined || (typeof digest === 'string' && /^[0-9a-f]{64}$/.test(digest))) return digest;
  throw new ToolstackError('bad-request', '"digest" is 64 hex digits, in lower case');
}

async function readBody(request: IncomingMessage): Promise<unknown> {
  const chunks: Buffer[] = [];
  let size = 0;
  for await (const chunk of request as AsyncIterable<Buffer>) {
    size += chunk.length;
    if (size > MAX_BODY_BYTES) {
      throw new ToolstackError('bad-request', `the body is over ${MAX_BODY_BYTES} bytes`);
    }
    chunks.push(chunk);
  }
  try {
    return JSON.parse(Buffer.concat(chunks).toString('utf8'));
  } catch {
    throw new ToolstackError('bad-request', 'the body is not JSON');
  }
}

function send(response: ServerResponse, status: number, body: unknown): void {
  const content = Buffer.from(`${JSON.stringify(body)}\n`);
  response.writeHead(status, { 'content-type': 'application/json', 'content-length': content.length });
  response.end(content);
}

/** The socket's mode keeps others out already; root may have passed a connection on. */
function refuseStrangers(socket: Socket): void {
  try {
    const { uid } = peerCredentials(socketFd(socket));
    if (uid === 0 || uid === process.getuid?.()) return;
  } catch {
    // Gone before it was looked at.
  }
  socket.destroy();
}

function listen(server: Server, path: string): Promise<void> {
  // This supervisor holds the lock of the path, so what is there was left by one that is gone.
  rmSync(path, { force: true });
  return new Promise((resolve, reject) => {
    server.once('error', reject);
    server.listen(path, () => {
      server.removeListener('error', reject);
      chmodSync(path, 0o600);
      resolve();
    });
  });
}
