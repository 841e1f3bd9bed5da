import { createServer, type IncomingMessage, type ServerResponse } from 'node:http';
import type { Socket } from 'node:net';
import type { Logger } from 'vtpm-common';
import type { AuditAction } from '../audit/index.js';
import { ManagerError } from '../error.js';
import { listenLocally } from '../local-socket.js';
import { errorAnswer, readBytes, readJson, sendJson, statusOf } from './http.js';
import { type AdminContext, type Answer, isUuid, matchRoute } from './route.js';
import { ROUTES } from './routes.js';

export interface AdminOptions extends AdminContext {
  readonly path: string;
  readonly log: Logger;
  /** That a caller has to send a whole request. */
  readonly requestTimeoutMs?: number;
}

export interface AdminPlane {
  close(): Promise<void>;
}

const REQUEST_TIMEOUT_MS = 10_000;
const CHECK_INTERVAL_MS = 1_000;
const MAX_HEADER_BYTES = 16 * 1024;

/** HTTP + JSON for the operator on a unix socket of mode 0600. Every change is in the log with the caller's uid. */
export async function serveAdmin(options: AdminOptions): Promise<AdminPlane> {
  const callers = new WeakMap<Socket, number>();
  const server = createServer(
    {
      requestTimeout: options.requestTimeoutMs ?? REQUEST_TIMEOUT_MS,
      connectionsCheckingInterval: CHECK_INTERVAL_MS,
      maxHeaderSize: MAX_HEADER_BYTES,
    },
    (request, response) => {
      response.on('error', () => undefined);
      void answer(request, response, options, callers.get(request.socket));
    },
  );
  // Its connections come from the listener below; this starts the watch over their time limits all the same.
  server.emit('listening');
  const listener = await listenLocally(options.path, options.log, (socket, peer) => {
    callers.set(socket, peer.uid);
    server.emit('connection', socket);
  });
  return {
    close: async () => {
      await listener.close();
      server.closeAllConnections();
      server.close();
    },
  };
}

/** Never rejects. */
async function answer(
  request: IncomingMessage,
  response: ServerResponse,
  options: AdminOptions,
  uid: number | undefined,
): Promise<void> {
  try {
    const found = await handle(request, response, options, { uid: uid ?? -1 });
    if (typeof found === 'function') await found(response);
    else sendJson(response, found);
  } catch (error) {
    const reason = named(error, options.log);
    if (!response.headersSent) return sendJson(response, errorAnswer(reason));
    options.log.warn({ reason: reason.code }, `an admin call broke off: ${reason.message}`);
    response.destroy();
  }
}

/** @throws ManagerError, also for a call that there is not */
async function handle(
  request: IncomingMessage,
  response: ServerResponse,
  options: AdminOptions,
  actor: { readonly uid: number },
): Promise<Answer> {
  const url = new URL(request.url ?? '/', 'http://localhost');
  const path = url.pathname.split('/').filter((part) => part !== '');
  const method = request.method ?? 'GET';
  const match = matchRoute(ROUTES, method, path);
  if ('allowed' in match) {
    const call = `${method} /${path.join('/')}`;
    if (match.allowed.length === 0) throw new ManagerError('unknown-call', `there is no ${call}`);
    response.setHeader('allow', match.allowed.join(', '));
    throw new ManagerError('wrong-method', `there is no ${call}, but ${match.allowed.join(' and ')}`);
  }
  const { route, params } = match;
  try {
    return await route.handle(
      {
        query: url.searchParams,
        param: (name) => params.get(name) ?? '',
        body: (limit) => readJson(request, limit),
        bytes: (limit) => readBytes(request, limit),
        actor,
      },
      options,
    );
  } catch (error) {
    const reason = named(error, options.log);
    if (route.audits && !reason.isAudited) await auditRefusal(route.audits, actor, params, reason, options);
    throw reason;
  }
}

/** A change that was asked for and not made is in the log too. */
async function auditRefusal(
  action: AuditAction,
  actor: { readonly uid: number },
  params: ReadonlyMap<string, string>,
  reason: ManagerError,
  { audit, log }: AdminOptions,
): Promise<void> {
  const { id, ...facts } = Object.fromEntries(params);
  try {
    await audit({
      actor,
      action,
      verdict: statusOf(reason) < 500 ? 'refused' : 'failed',
      reason,
      ...(id !== undefined && (isUuid(id) ? { vtpm: id } : { facts: { id } })),
      ...(Object.keys(facts).length > 0 && { facts }),
    });
  } catch (error) {
    const { code } = ManagerError.from(error);
    log.warn(
      { uid: actor.uid, action, refused: reason.code, reason: code },
      'a refused change is not in the audit log',
    );
  }
}

function named(error: unknown, log: Logger): ManagerError {
  if (error instanceof ManagerError) return error;
  log.error({ err: error }, 'an admin call failed');
  return new ManagerError('internal', 'the manager failed to do this; its log says why', { cause: error });
}
