import { Socket } from 'node:net';
import { setDefaultHighWaterMark } from 'node:stream';
import { setTimeout as delay } from 'node:timers/promises';
import {
  type handleBidiStreamingCall,
  type handleUnaryCall,
  Server,
  ServerCredentials,
  type ServiceDefinition,
} from '@grpc/grpc-js';
import type { Logger } from 'vtpm-common';
import { encode, LOAD_PATH, MIGRATE_PATH, SAVE_PATH } from 'vtpm-proto';
import type { ManagerErrorCode } from '../error.js';
import { type LocalListener, listenLocally } from '../local-socket.js';
import { metrics } from '../metrics.js';
import type { VtpmRegistry } from '../ownership/registry.js';
import {
  type AdmittedConnection,
  CallLimits,
  DEFAULT_LIMITS,
  type Limits,
  MESSAGES_AHEAD,
  within,
} from './limits.js';
import { readMessage } from './messages.js';
import { MigrateCall, type ToolstackService } from './migrate-call.js';
import { serveSaveStream } from './save-stream.js';
import { refusal, statusOf } from './status.js';

/** A Load that is none, or that nobody signed who may, costs its connection. A worker that has its vTPM keeps it. */
const BOGUS: ReadonlySet<ManagerErrorCode> = new Set<ManagerErrorCode>([
  'bad-request',
  'too-large',
  'newer-format',
  'ticket-forged',
  'unknown-toolstack-key',
]);

/** Milliseconds between two looks at what the connections send. */
const WATCH_MS = 250;

/** What the workers' calls need of the registry. */
export type WorkerService = Pick<VtpmRegistry, 'load' | 'attach'>;

/** Messages of a call as they are. */
export const raw = {
  requestSerialize: (bytes: Buffer) => bytes,
  requestDeserialize: (bytes: Buffer) => bytes,
  responseSerialize: (bytes: Buffer) => bytes,
  responseDeserialize: (bytes: Buffer) => bytes,
};

/**
 * The whole gRPC surface for workers. Messages are handed over as bytes: what does not decode is then this project's
 * refusal, by name, and ends one call only.
 */
export const workerServiceDefinition = {
  Load: { path: LOAD_PATH, requestStream: false, responseStream: false, ...raw },
  Save: { path: SAVE_PATH, requestStream: true, responseStream: true, ...raw },
} as const satisfies ServiceDefinition;

export interface GrpcListener {
  /** Takes no more connections, ends those that are open. */
  close(): Promise<void>;
}

/** @param service asked at each call; throws ManagerError `locked` or `shutting-down` where there is none */
export async function serveWorkers(
  path: string,
  service: () => WorkerService,
  log: Logger,
  limits: Limits = DEFAULT_LIMITS,
): Promise<GrpcListener> {
  const connections = new Map<string, AdmittedConnection>();
  const callLimits = new CallLimits(limits);
  const server = newServer();
  const load: handleUnaryCall<Buffer, Buffer> = (call, callback) => {
    const connection = connectionOf(connections, call.getPeer(), callLimits);
    connection.open += 1;
    const gone = new AbortController();
    call.on('cancelled', () => gone.abort());
    const run = async (): Promise<Buffer> => {
      callLimits.admitMessage(connection, call.request.length);
      callLimits.admitLoad(connection);
      const request = readMessage('LoadRequest', call.request);
      return encode(
        'LoadResponse',
        await within(limits.loadDeadlineMs, (extend) =>
          service().load(request, connection.worker, () => callLimits.admitSigned(connection), {
            signal: gone.signal,
            extend,
          }),
        ),
      );
    };
    const answered = run().then(
      (bytes) => {
        metrics.load('granted');
        callback(null, bytes);
      },
      async (error: unknown) => {
        const reason = refusal(error);
        metrics.load(reason.code);
        log.warn(
          { reason: reason.code, cause: (reason.cause as Error | undefined)?.message },
          reason.message,
        );
        await delay(limits.refusalPauseMs);
        callback(statusOf(reason));
        if (!BOGUS.has(reason.code) || connection.worker.session) return;
        // The answer is on its way by then.
        await delay(limits.refusalPauseMs);
        connection.close();
      },
    );
    void answered.finally(() => {
      connection.open -= 1;
    });
  };
  const save: handleBidiStreamingCall<Buffer, Buffer> = (call) => {
    const connection = connectionOf(connections, call.getPeer(), callLimits);
    connection.open += 1;
    call.once('close', () => {
      connection.open -= 1;
    });
    try {
      callLimits.admitCall(connection);
    } catch (error) {
      void delay(limits.refusalPauseMs).then(() => call.emit('error', statusOf(refusal(error))));
      return;
    }
    serveSaveStream(call, service, connection, callLimits, log);
  };
  server.addService(workerServiceDefinition, { Load: load, Save: save });
  const watch = setInterval(() => {
    for (const connection of connections.values()) {
      if (!callLimits.isNoise(connection)) continue;
      log.warn(
        { uid: connection.uid, reason: 'rate-limited' },
        'a connection is closed: it sends no messages',
      );
      connection.close();
    }
  }, WATCH_MS);
  watch.unref();
  const listener = await listen(server, path, log, (socket, name, uid) => {
    if (!callLimits.admitConnection(uid, connections)) {
      log.warn({ uid, reason: 'rate-limited' }, 'a connection is closed: too many at once');
      return false;
    }
    connections.set(name, admitted(uid, callLimits, socket));
    socket.once('close', () => connections.delete(name));
    return true;
  });
  return {
    close: () => {
      clearInterval(watch);
      return listener.close();
    },
  };
}

function admitted(uid: number, limits: CallLimits, socket: Socket): AdmittedConnection {
  return {
    uid,
    calls: 0,
    loads: 0,
    open: 0,
    messageBytes: 0,
    saves: limits.newBucket(),
    worker: {},
    received: () => socket.bytesRead,
    close: () => socket.destroy(),
  };
}

/** The whole gRPC surface for toolstacks. */
export const toolstackServiceDefinition = {
  Migrate: { path: MIGRATE_PATH, requestStream: true, responseStream: true, ...raw },
} as const satisfies ServiceDefinition;

/** Connections that are open at the same time: an evacuation has one for each migration under way. */
const MAX_TOOLSTACK_CONNECTIONS = 128;

/** @param service asked at each call; throws ManagerError `locked` or `shutting-down` where there is none */
export function serveToolstack(
  path: string,
  service: () => ToolstackService,
  log: Logger,
): Promise<GrpcListener> {
  const server = newServer();
  const migrate: handleBidiStreamingCall<Buffer, Buffer> = (call) => {
    new MigrateCall(call, service, log).serve();
  };
  server.addService(toolstackServiceDefinition, { Migrate: migrate });
  let open = 0;
  return listen(server, path, log, (socket, _, uid) => {
    if (open >= MAX_TOOLSTACK_CONNECTIONS) {
      log.warn({ uid, reason: 'rate-limited' }, 'a connection is closed: too many at once');
      return false;
    }
    open += 1;
    socket.once('close', () => {
      open -= 1;
    });
    return true;
  });
}

export function newServer(): Server {
  // grpc-js reads 16 messages of a stream ahead, however large they are, and has no setting for it. Its calls are the only
  // streams of objects in this process.
  setDefaultHighWaterMark(true, MESSAGES_AHEAD);
  // Keepalive pings stay off: a worker's death closes its socket, and another host asks by itself.
  return new Server({
    'grpc.max_receive_message_length': DEFAULT_LIMITS.transportBytes,
    'grpc.max_send_message_length': DEFAULT_LIMITS.transportBytes,
    'grpc.max_concurrent_streams': DEFAULT_LIMITS.streams,
    'grpc.enable_channelz': 0,
  });
}

async function listen(
  server: Server,
  path: string,
  log: Logger,
  admit: (socket: Socket, name: string, uid: number) => boolean,
): Promise<GrpcListener> {
  const injector = server.createConnectionInjector(ServerCredentials.createInsecure());
  let count = 0;
  const listener: LocalListener = await listenLocally(path, log, (socket, { uid }) => {
    count += 1;
    const name = `connection-${count}`;
    nameConnection(socket, name);
    if (admit(socket, name, uid)) injector.injectConnection(socket);
    else socket.destroy();
  });
  return {
    close: async () => {
      await listener.close();
      server.forceShutdown();
    },
  };
}

/**
 * grpc-js tells a call's connection only by its peer address, and a unix socket has none: this gives it one. Of a TCP
 * connection it takes the place of the address.
 */
export function nameConnection(socket: Socket, name: string): void {
  Object.defineProperty(socket, 'remoteAddress', { value: name });
  Object.defineProperty(socket, 'remotePort', { value: undefined });
}

function connectionOf(
  connections: ReadonlyMap<string, AdmittedConnection>,
  peer: string,
  limits: CallLimits,
): AdmittedConnection {
  const connection = connections.get(peer);
  // The socket closed while the call was on its way: what it does has no connection to be bound to.
  return connection ?? { ...admitted(-1, limits, new Socket()), worker: { isLoading: true } };
}
