import type { IncomingMessage, ServerResponse } from 'node:http';
import { Socket } from 'node:net';
import { type Logger, readBody, VERSION } from 'vtpm-common';
import { ToolstackError, type ToolstackErrorCode } from '../error.js';
import { ApiServer } from './api-server.js';
import type { DropinServer } from './dropin/server.js';
import { parseEntryChange } from './entry.js';
import type { Inheritance } from './handover/inheritance.js';
import { upgrade } from './handover/upgrade.js';
import { isolationProfile } from './layers.js';
import { readOrder } from './migration/order.js';
import type { Supervisor } from './supervisor.js';

export interface SupervisorApi {
  /** No new calls; those under way are answered. @param done when what they wait for has been done */
  close(done: Promise<void>): Promise<void>;
}

const MAX_BODY_BYTES = 64 * 1024;

/**
 * HTTP and JSON on a unix socket, for root and the supervisor's own user. Errors are `{error: {code, message}}`.
 * @param before the one who asked for the hand-over is answered at once
 */
export async function serveApi(
  supervisor: Supervisor,
  dropin: DropinServer,
  path: string,
  log: Logger,
  before?: Inheritance,
): Promise<SupervisorApi> {
  let isClosing = false;
  const server: ApiServer = await ApiServer.open(
    {
      path,
      log,
      handle: (request, response) => {
        if (isClosing) {
          send(response, 503, {
            error: { code: 'busy', message: 'the supervisor is stopping; start it again' },
          });
        } else {
          void answer({ supervisor, server, dropin, log }, request, response);
        }
      },
    },
    before && { state: before.state.api, descriptors: before.descriptors },
  );
  const caller = before?.state.api.caller ?? null;
  if (before && caller !== null) answerUpgraded(before.descriptors.takeSocket(caller), healthOf(supervisor));
  return {
    close: (done) => {
      isClosing = true;
      return server.close(done);
    },
  };
}

const STATUS: Readonly<Partial<Record<ToolstackErrorCode, number>>> = {
  'bad-request': 400,
  'image-not-allowed': 403,
  'not-permitted': 403,
  'token-refused': 403,
  'image-changed': 409,
  'upgrade-refused': 409,
  'unknown-vtpm': 404,
  'unknown-migration': 404,
  'not-running': 409,
  migrating: 409,
  moved: 409,
  'name-taken': 409,
  'not-stopped': 409,
  'already-running': 409,
  busy: 409,
  'manager-refused': 502,
  'worker-failed': 502,
  'worker-late': 502,
  'manager-unreachable': 503,
  locked: 503,
  'layer-missing': 503,
  'store-full': 507,
};

interface Served {
  readonly supervisor: Supervisor;
  readonly server: ApiServer;
  readonly dropin: DropinServer;
  readonly log: Logger;
}

async function answer(served: Served, request: IncomingMessage, response: ServerResponse): Promise<void> {
  try {
    const migrating = migratedName(request);
    if (migrating !== undefined) {
      await migrate(served, migrating, request, response);
      return;
    }
    const { status, body } = await dispatch(served, request);
    send(response, status, body);
  } catch (caught) {
    const error = ToolstackError.from(caught);
    if (error.code === 'internal') served.log.error({ err: error }, 'a call failed');
    send(response, STATUS[error.code] ?? 500, { error: { code: error.code, message: error.message } });
  }
}

/** Of POST /vtpms/:vtpm/migrate, whose answer comes line by line. */
function migratedName(request: IncomingMessage): string | undefined {
  const [, collection, name, verb, ...rest] = pathOf(request).split('/');
  const isThis = request.method === 'POST' && collection === 'vtpms' && verb === 'migrate';
  return isThis && rest.length === 0 ? decoded(name) : undefined;
}

/** Who asked may go: the migration goes on. */
async function migrate(
  { supervisor }: Served,
  name: string,
  request: IncomingMessage,
  response: ServerResponse,
): Promise<void> {
  const vtpm = supervisor.find(name);
  const order = readOrder(await readJson(request));
  if (order.vtpm !== vtpm.entry.id) {
    throw new ToolstackError('bad-request', `the order is for vTPM ${order.vtpm}, not for ${vtpm.entry.id}`);
  }
  await vtpm.travels.leave(order, (line) => {
    if (!response.headersSent) response.writeHead(200, { 'content-type': 'application/x-ndjson' });
    response.write(`${JSON.stringify(line)}\n`);
  });
  response.end();
}

async function dispatch(
  served: Served,
  request: IncomingMessage,
): Promise<{ status: number; body: unknown }> {
  const { supervisor } = served;
  const [, collection, name, verb, ...rest] = pathOf(request).split('/');
  const call = `${request.method} /${collection}${name ? '/:vtpm' : ''}${verb ? `/${verb}` : ''}`;
  if (rest.length > 0) throw unknownCall(request);
  switch (call) {
    case 'GET /health':
      return { status: 200, body: healthOf(supervisor) };
    case 'POST /upgrade':
      return await upgrade(served, request.socket);
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
      return { status: 201, body: supervisor.create(await readJson(request)).view() };
    case 'GET /vtpms/:vtpm':
      return { status: 200, body: supervisor.find(decoded(name)).view('now') };
    case 'PATCH /vtpms/:vtpm': {
      const vtpm = supervisor.find(decoded(name));
      await vtpm.change(parseEntryChange(await readJson(request)));
      return { status: 200, body: vtpm.view() };
    }
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
    case 'DELETE /vtpms/:vtpm/migrate':
      return { status: 200, body: { cancelled: supervisor.find(decoded(name)).travels.cancel() } };
    default:
      throw unknownCall(request);
  }
}

function unknownCall(request: IncomingMessage): ToolstackError {
  return new ToolstackError(
    'bad-request',
    `there is no call ${request.method} ${pathOf(request).slice(0, 128)}`,
  );
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
    upgrades: supervisor.upgrades,
  };
}

/** To a call that was made to the program before this one. */
function answerUpgraded(fd: number, body: unknown): void {
  const content = `${JSON.stringify(body)}\n`;
  const head = [
    'HTTP/1.1 200 OK',
    'content-type: application/json',
    `content-length: ${Buffer.byteLength(content)}`,
    'connection: close',
  ];
  const socket = new Socket({ fd, readable: false, writable: true });
  socket.on('error', () => undefined);
  socket.end(`${head.join('\r\n')}\r\n\r\n${content}`);
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
  const { digest } = ((await readJson(request)) ?? {}) as { digest?: unknown };
  if (digest === undefined || (typeof digest === 'string' && /^[0-9a-f]{64}$/.test(digest))) return digest;
  throw new ToolstackError('bad-request', '"digest" is 64 hex digits, in lower case');
}

async function readJson(request: IncomingMessage): Promise<unknown> {
  const body = await readBody(request, MAX_BODY_BYTES);
  if (!body) throw new ToolstackError('bad-request', `the body is over ${MAX_BODY_BYTES} bytes`);
  try {
    return JSON.parse(body.toString('utf8'));
  } catch {
    throw new ToolstackError('bad-request', 'the body is not JSON');
  }
}

function send(response: ServerResponse, status: number, body: unknown): void {
  const content = Buffer.from(`${JSON.stringify(body)}\n`);
  response.writeHead(status, { 'content-type': 'application/json', 'content-length': content.length });
  response.end(content);
}
