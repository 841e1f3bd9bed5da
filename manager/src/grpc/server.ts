import type { Socket } from 'node:net';
import {
  type handleBidiStreamingCall,
  type handleUnaryCall,
  Server,
  ServerCredentials,
  type ServiceDefinition,
} from '@grpc/grpc-js';
import type { Logger } from 'vtpm-common';
import { encode, LOAD_PATH, SAVE_PATH } from 'vtpm-proto';
import { type LocalListener, listenLocally } from '../local-socket.js';
import type { VtpmRegistry, WorkerConnection } from '../ownership/registry.js';
import { readMessage } from './messages.js';
import { serveSaveStream } from './save-stream.js';
import { refusal, statusOf } from './status.js';

/** What the workers' calls need of the registry. */
export type WorkerService = Pick<VtpmRegistry, 'load' | 'attach'>;

/** Above the contract's limit, so that a message between the two gets the named refusal instead of grpc-js's own. */
const TRANSPORT_LIMIT = 1024 * 1024;
/** A worker has two calls open at most. */
const MAX_STREAMS = 8;

const raw = {
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
): Promise<GrpcListener> {
  const connections = new Map<string, WorkerConnection>();
  const server = newServer();
  const load: handleUnaryCall<Buffer, Buffer> = (call, callback) => {
    const run = async (): Promise<Buffer> => {
      const request = readMessage('LoadRequest', call.request);
      return encode('LoadResponse', await service().load(request, connectionOf(connections, call.getPeer())));
    };
    run().then(
      (bytes) => callback(null, bytes),
      (error: unknown) => {
        const reason = refusal(error);
        log.warn(
          { reason: reason.code, cause: (reason.cause as Error | undefined)?.message },
          reason.message,
        );
        callback(statusOf(reason));
      },
    );
  };
  const save: handleBidiStreamingCall<Buffer, Buffer> = (call) => {
    serveSaveStream(call, service, connectionOf(connections, call.getPeer()), log);
  };
  server.addService(workerServiceDefinition, { Load: load, Save: save });
  return await listen(server, path, log, (socket, name) => {
    connections.set(name, {});
    socket.once('close', () => connections.delete(name));
  });
}

/** The toolstack's socket: its calls come with migration, until then each is UNIMPLEMENTED. */
export function serveToolstack(path: string, log: Logger): Promise<GrpcListener> {
  return listen(newServer(), path, log, () => undefined);
}

function newServer(): Server {
  // Keepalive pings stay off: the peer is a process on this host, its death closes the socket.
  return new Server({
    'grpc.max_receive_message_length': TRANSPORT_LIMIT,
    'grpc.max_send_message_length': TRANSPORT_LIMIT,
    'grpc.max_concurrent_streams': MAX_STREAMS,
    'grpc.enable_channelz': 0,
  });
}

async function listen(
  server: Server,
  path: string,
  log: Logger,
  onConnection: (socket: Socket, name: string) => void,
): Promise<GrpcListener> {
  const injector = server.createConnectionInjector(ServerCredentials.createInsecure());
  let count = 0;
  const listener: LocalListener = await listenLocally(path, log, (socket) => {
    count += 1;
    const name = `connection-${count}`;
    nameConnection(socket, name);
    onConnection(socket, name);
    injector.injectConnection(socket);
  });
  return {
    close: async () => {
      await listener.close();
      server.forceShutdown();
    },
  };
}

/**
 * grpc-js tells a call's connection only by its peer address, and a unix socket has none: this gives it one.
 */
function nameConnection(socket: Socket, name: string): void {
  Object.defineProperty(socket, 'remoteAddress', { value: name });
}

function connectionOf(connections: ReadonlyMap<string, WorkerConnection>, peer: string): WorkerConnection {
  const connection = connections.get(peer);
  // The socket closed while the call was on its way: what it does has no connection to be bound to.
  return connection ?? { isLoading: true };
}
