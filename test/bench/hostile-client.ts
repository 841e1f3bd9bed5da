/**
 * A worker that does what it should not, against a real manager. Started by hostile-rows.ts, which talks to it over Node's
 * IPC and ends it.
 */
import { boxKeyPair, decode } from 'vtpm-proto';
import { badCalls, flood, LARGEST_SAVE, SMALLEST_SAVE, stall } from '../support/hostile-worker.js';
import { type TestVtpm, WorkerClient } from '../support/worker-client.js';

export type Hostility =
  | 'floods with small Saves'
  | 'floods with the largest Saves'
  | 'does not read'
  | 'calls nonsense';

export interface HostileOrder {
  readonly what: Hostility;
  readonly socketPath: string;
  /** Hexadecimal. */
  readonly managerKey: string;
  /** Hexadecimal. */
  readonly secretKey: string;
  /** Base64 of the SignedTicket. */
  readonly ticket: string;
  readonly vtpmId: string;
  /** Hexadecimal. */
  readonly vtpmUuid: string;
}

process.once('message', (order: HostileOrder) => {
  run(order).catch((error: unknown) => {
    console.error(error);
    process.exit(1);
  });
});

async function run(order: HostileOrder): Promise<void> {
  const managerId = Buffer.from(order.managerKey, 'hex');
  const keys = boxKeyPair(Buffer.from(order.secretKey, 'hex'));
  const worker = new WorkerClient(order.socketPath, managerId, keys);
  const grant = await worker.load(decode('SignedTicket', Buffer.from(order.ticket, 'base64')));
  const uuid = Buffer.from(order.vtpmUuid, 'hex');
  const vtpm: TestVtpm = { id: order.vtpmId, uuid, vmUuid: Buffer.alloc(16) };
  const session = await worker.session(vtpm, grant);
  process.send?.('ready');
  let running: AbortController | undefined;
  process.on('message', (instruction: 'go' | 'rest') => {
    running?.abort();
    running = instruction === 'go' ? new AbortController() : undefined;
    if (!running) return;
    void act(order.what, running.signal);
  });

  async function act(what: Hostility, signal: AbortSignal): Promise<void> {
    if (what === 'calls nonsense') {
      await badCalls(() => new WorkerClient(order.socketPath, managerId), signal);
    } else if (what === 'does not read') {
      await stall(session, LARGEST_SAVE, 64);
    } else {
      await flood(session, what === 'floods with small Saves' ? SMALLEST_SAVE : LARGEST_SAVE, signal);
    }
  }
}
