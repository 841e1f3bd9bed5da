import { ManagerError } from '../error.js';
import type { WorkerConnection } from '../ownership/registry.js';

/**
 * What the workers' socket takes of one caller. A worker has one connection and gets a new one only from its supervisor,
 * so what a hostile one can do is bounded by its connection; the limits of a uid bound a supervisor that has lost its
 * mind. All are far above what a host full of vTPMs needs at once.
 */
export interface Limits {
  /** Bytes of a message on the wire. Above the contract's own limit, so that what lies between is refused by name. */
  readonly transportBytes: number;
  /** Calls open on a connection; a worker has two at most. */
  readonly streams: number;
  /**
   * Calls that a connection may begin: an honest worker needs one Load and one Save stream. Those above are refused, and
   * above twice as many the connection is closed.
   */
  readonly callsPerConnection: number;
  /** Loads of a uid. Their signatures and boxes are what costs the manager most. */
  readonly loadsPerUid: Rate;
  /** Connections of a uid: all its workers come back at once after a restart of the manager. */
  readonly connectionsPerUid: Rate;
  /** Milliseconds until a Load is answered, whatever the store does. */
  readonly loadDeadlineMs: number;
}

/** `burst` at once, then `perSecond`. */
export interface Rate {
  readonly burst: number;
  readonly perSecond: number;
}

/** docs/bad-input.md has this table for operators. */
export const DEFAULT_LIMITS: Limits = {
  transportBytes: 1024 * 1024,
  streams: 8,
  callsPerConnection: 16,
  loadsPerUid: { burst: 512, perSecond: 64 },
  connectionsPerUid: { burst: 4096, perSecond: 256 },
  loadDeadlineMs: 20_000,
};

/** A connection that was let in, and what it has used up. */
export interface AdmittedConnection {
  readonly uid: number;
  readonly worker: WorkerConnection;
  calls: number;
  close(): void;
}

/** Counts what callers do. Time is that of the process: no wall clock enters it. */
export class CallLimits {
  readonly #loads: Buckets;
  readonly #connections: Buckets;

  constructor(private readonly limits: Limits) {
    this.#loads = new Buckets(limits.loadsPerUid);
    this.#connections = new Buckets(limits.connectionsPerUid);
  }

  admitConnection(uid: number): boolean {
    return this.#connections.take(uid);
  }

  /** @throws ManagerError `rate-limited` */
  admitCall(connection: AdmittedConnection): void {
    const { callsPerConnection } = this.limits;
    connection.calls += 1;
    if (connection.calls > 2 * callsPerConnection) connection.close();
    if (connection.calls > callsPerConnection) {
      throw new ManagerError(
        'rate-limited',
        `this connection has made ${callsPerConnection} calls; connect again`,
      );
    }
  }

  /** @throws ManagerError `rate-limited` */
  admitLoad(connection: AdmittedConnection): void {
    this.admitCall(connection);
    if (!this.#loads.take(connection.uid)) {
      throw new ManagerError('rate-limited', 'too many Loads at once from this user; try again in a moment');
    }
  }
}

/** @throws ManagerError `deadline`; what `body` began goes on without the caller */
export function within<T>(milliseconds: number, body: () => Promise<T>): Promise<T> {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => {
      reject(
        new ManagerError(
          'deadline',
          `the Load was not done within ${milliseconds} ms; whether it was is told by the next one, with a new ticket`,
        ),
      );
    }, milliseconds);
    const settled = (): void => clearTimeout(timer);
    // What `body` throws at once is a rejection too.
    const run = async (): Promise<T> => body();
    run().then(resolve, reject).finally(settled);
  });
}

/** Token buckets by uid. Only root and the manager's own uid get here. */
class Buckets {
  readonly #buckets = new Map<number, { tokens: number; at: number }>();

  constructor(private readonly rate: Rate) {}

  take(uid: number): boolean {
    const { burst, perSecond } = this.rate;
    const now = performance.now();
    const last = this.#buckets.get(uid) ?? { tokens: burst, at: now };
    const tokens = Math.min(burst, last.tokens + ((now - last.at) / 1000) * perSecond);
    if (tokens < 1) return false;
    this.#buckets.set(uid, { tokens: tokens - 1, at: now });
    return true;
  }
}
