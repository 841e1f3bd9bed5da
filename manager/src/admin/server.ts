import { createServer, type IncomingMessage, type ServerResponse } from 'node:http';
import type { Socket } from 'node:net';
import type { Finding, Logger } from 'vtpm-common';
import { ManagerError } from '../error.js';
import { listenLocally } from '../local-socket.js';
import type { PlatformControl } from '../platform-control.js';
import { streamEvents } from './event-stream.js';
import { errorAnswer, readJson, sendJson } from './http.js';
import { routePlatform } from './platform-routes.js';
import { type AdminRequest, type AdminService, route } from './routes.js';

/** What `GET /health` says. */
export interface Health {
  readonly status: 'starting' | 'ready' | 'locked';
  /** Why it is locked: an error code and its sentence. */
  readonly reason?: string;
  readonly message?: string;
  readonly version: string;
  readonly managerId: string;
  readonly storeId: string;
  readonly tpm: {
    readonly kind: string;
    readonly path: string;
    readonly manufacturer: string;
    readonly hardwareProtected: boolean;
  };
  readonly pcrSelection: string;
  readonly vtpms: number | null;
  /** Random, new in each process. */
  readonly instance: string;
}

export interface AdminOptions {
  readonly path: string;
  readonly log: Logger;
  /** That a caller has to send a whole request. */
  readonly requestTimeoutMs?: number;
  health(): Health;
  /** What `GET /doctor` says of the TPM; works while locked too. */
  doctor(): Promise<Finding[]>;
  /** @throws ManagerError `locked` where only /health works */
  service(): AdminService;
  /** Works while locked too. */
  platform(): PlatformControl;
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
    const url = new URL(request.url ?? '/', 'http://localhost');
    const path = url.pathname.split('/').filter((part) => part !== '');
    const method = request.method ?? 'GET';
    const call = `${method} /${path.join('/')}`;
    if (call === 'GET /health') return sendJson(response, { status: 200, body: options.health() });
    if (call === 'GET /doctor') {
      return sendJson(response, { status: 200, body: { findings: await options.doctor() } });
    }
    const admin: AdminRequest = {
      method,
      path,
      query: url.searchParams,
      body: (limit) => readJson(request, limit),
      actor: { uid: uid ?? -1 },
    };
    const platform = await routePlatform(admin, options.platform);
    if (platform) return sendJson(response, platform);
    const service = options.service();
    if (call === 'GET /events') {
      return streamEvents(response, service.registry.events, options.health().instance);
    }
    const found = await route(admin, service);
    sendJson(
      response,
      found ?? { status: 404, body: { error: { code: 'bad-request', message: `there is no ${call}` } } },
    );
  } catch (error) {
    const known = error instanceof ManagerError;
    if (!known) options.log.error({ err: error }, 'an admin call failed');
    const reason = known
      ? error
      : new ManagerError('internal', 'the manager failed to do this; its log says why');
    if (response.headersSent) response.destroy();
    else sendJson(response, errorAnswer(reason));
  }
}
