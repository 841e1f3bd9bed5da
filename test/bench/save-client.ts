/**
 * Load on a manager: the worker's own client (loadVtpm and SaveSession over HTTP/2) without a TPM, many streams in one
 * process. Started by save-rows.ts, which talks to it over Node's IPC.
 */
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { connect } from 'node:net';
import { boxKeyPair } from 'vtpm-proto';
import { loadVtpm, readIdentity } from 'vtpmd/manager-link/load';
import { LoadKeys } from 'vtpmd/manager-link/load-keys';
import { openManagerLink } from 'vtpmd/manager-link/manager-link';
import { SaveSession } from 'vtpmd/manager-link/save-session';

export interface StreamIdentity {
  /** Hexadecimal. */
  readonly secretKey: string;
  /** Base64 of the SignedTicket. */
  readonly ticket: string;
}

export interface SaveOrder {
  readonly socketPath: string;
  /** Hexadecimal. */
  readonly managerKey: string;
  readonly stateBytes: number;
  readonly streams: readonly StreamIdentity[];
}

/** `go` starts the streams; `mark` forgets what was measured; `report` answers with `Measured` and ends the process. */
export type Instruction = 'go' | 'mark' | 'report';

export interface MeasuredSaves {
  /** Milliseconds after `mark` at which each save was acknowledged, and how long it had taken. */
  readonly at: readonly number[];
  readonly took: readonly number[];
}

const LIBTPMS = '0.9.2';
let marked = performance.now();
let at: number[] = [];
let took: number[] = [];

process.once('message', (order: SaveOrder) => {
  run(order).catch((error: unknown) => {
    console.error(error);
    process.exit(1);
  });
});

async function run(order: SaveOrder): Promise<void> {
  const sessions: SaveSession[] = [];
  for (const stream of order.streams) sessions.push(await open(order, stream));
  process.on('message', (instruction: Instruction) => {
    if (instruction === 'go') {
      for (const session of sessions) void saveForever(session, randomBytes(order.stateBytes));
    } else if (instruction === 'mark') {
      marked = performance.now();
      at = [];
      took = [];
    } else {
      process.send?.({ at, took } satisfies MeasuredSaves, () => process.exit(0));
    }
  });
  process.send?.('ready');
}

async function open(order: SaveOrder, stream: StreamIdentity): Promise<SaveSession> {
  const socket = connect(order.socketPath);
  await once(socket, 'connect');
  const link = openManagerLink(socket);
  const identity = readIdentity({
    ticket: stream.ticket,
    managerKey: order.managerKey,
    startup: 'clear',
  });
  const keys = new LoadKeys(boxKeyPair(Buffer.from(stream.secretKey, 'hex')));
  const grant = await loadVtpm(link, identity, keys, LIBTPMS);
  return await new Promise((resolve, reject) => {
    const session: SaveSession = new SaveSession(grant, identity.vtpmUuid, LIBTPMS, {
      up: () => resolve(session),
      lost: reject,
      over: (error) => {
        console.error(error);
        process.exit(1);
      },
      freeze: () => {},
      thaw: () => {},
    });
    session.attach(link);
  });
}

async function saveForever(session: SaveSession, state: Buffer): Promise<void> {
  for (;;) {
    const start = performance.now();
    await session.save(state);
    const now = performance.now();
    at.push(now - marked);
    took.push(now - start);
  }
}
