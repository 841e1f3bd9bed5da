import { type ClientHttp2Stream, connect } from 'node:http2';
import { createConnection } from 'node:net';
import {
  decode,
  encode,
  frameMessage,
  MIGRATE_PATH,
  type MigrateCommand,
  type MigrateProgress,
  type SignedMigrateOrder,
} from 'vtpm-proto';
import { type CallEnd, receiveCall, startCall } from 'vtpm-proto/grpc-call';
import { isToolstackErrorCode, ToolstackError } from '../../error.js';

/** An order under way at the manager. */
export interface MigrateCall {
  /** The worker has ended. */
  reaped(): void;
  /** Heard until the state is on its way. */
  cancel(): void;
  /** Resolves when the manager has said its last word. @throws ToolstackError where that was a refusal, or none */
  readonly ended: Promise<void>;
}

/** Orders a migration. `onProgress` gets what the manager says of it, in order. */
export function openMigrateCall(
  socketPath: string,
  order: SignedMigrateOrder,
  onProgress: (progress: MigrateProgress) => void,
): MigrateCall {
  const session = connect('http://localhost', { createConnection: () => createConnection(socketPath) });
  let unreachable: Error | undefined;
  session.on('error', (error) => {
    unreachable = error;
  });
  const stream: ClientHttp2Stream = startCall(session, MIGRATE_PATH);
  const send = (command: MigrateCommand): void => {
    if (!stream.destroyed) stream.write(frameMessage(encode('MigrateCommand', command)));
  };
  const ended = new Promise<void>((resolve, reject) => {
    receiveCall(
      stream,
      (message) => onProgress(decode('MigrateProgress', message)),
      (end) => {
        session.destroy();
        const refusal = refusalOf(end, unreachable);
        if (refusal) reject(refusal);
        else resolve();
      },
    );
  });
  ended.catch(() => undefined);
  send({ order });
  return { reaped: () => send({ reaped: {} }), cancel: () => send({ cancel: {} }), ended };
}

/** gRPC: "The operation is not implemented or is not supported." */
const UNIMPLEMENTED = 12;

function refusalOf(end: CallEnd, unreachable: Error | undefined): ToolstackError | undefined {
  switch (end.kind) {
    case 'status': {
      const { code, message, reason } = end;
      if (code === 0) return undefined;
      if (code === UNIMPLEMENTED) {
        return new ToolstackError('manager-refused', 'this manager knows no migration; upgrade it');
      }
      return new ToolstackError(isToolstackErrorCode(reason) ? reason : 'manager-refused', message);
    }
    case 'cut':
      return new ToolstackError(
        'manager-unreachable',
        `vtpm-managerd does not say more (${unreachable?.message ?? end.message}); look into its log, then ask for the vTPM`,
      );
    case 'unreadable':
      return new ToolstackError(
        'manager-refused',
        'the manager says of the migration what this version does not know',
        {
          cause: end.cause,
        },
      );
  }
}
