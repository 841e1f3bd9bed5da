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
  /** An honest worker needs one. A second one finds out what became of the first, and more are refused. */
  readonly loadsPerConnection: number;
  /**
   * Loads of a uid whose ticket is signed by who may. Their boxes and records are what costs the manager most, and no worker
   * can use up what is meant for all of them: a ticket comes from the supervisor.
   */
  readonly loadsPerUid: Rate;
  /** Connections of a uid: all its workers come back at once after a restart of the manager. */
  readonly connectionsPerUid: Rate;
  /** Connections that are open at the same time. */
  readonly openConnections: number;
  /**
   * Those of a uid that have no session: of workers that wait for a vTPM, for as long as it takes, and of those that come
   * back after a restart of the manager. Above it no more are taken, so that they leave room for those that work.
   */
  readonly waitingPerUid: number;
  /**
   * Bytes of Saves of a connection while others save too. What is above waits unread in its socket, so that a worker with
   * the largest saves leaves the manager and its disk to the others for most of the time.
   */
  readonly saveBytes: Rate;
  /** Milliseconds until a call is refused: who makes nonsense of his calls does it slowly. */
  readonly refusalPauseMs: number;
  /**
   * Bytes that a connection may send beside the messages that the manager takes, and those on their way in open calls:
   * frames of HTTP/2, calls of methods that there are not. Above it the connection is closed.
   */
  readonly otherBytes: number;
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
  transportBytes: 576 * 1024,
  streams: 4,
  callsPerConnection: 16,
  loadsPerConnection: 2,
  loadsPerUid: { burst: 512, perSecond: 64 },
  connectionsPerUid: { burst: 4096, perSecond: 256 },
  openConnections: 8192,
  waitingPerUid: 2048,
  saveBytes: { burst: 2 * 1024 * 1024, perSecond: 8 * 1024 * 1024 },
  refusalPauseMs: 20,
  otherBytes: 128 * 1024,
  loadDeadlineMs: 20_000,
};

/** A connection that was let in, and what it has used up. */
export interface AdmittedConnection {
  readonly uid: number;
  readonly worker: WorkerConnection;
  calls: number;
  loads: number;
  /** Calls under way. */
  open: number;
  /** Bytes of its messages, with what HTTP/2 puts around them. */
  messageBytes: number;
  readonly saves: Bucket;
  /** Bytes that came so far. */
  received(): number;
  close(): void;
}

/** Counts what callers do. Time is that of the process: no wall clock enters it. */
export class CallLimits {
  readonly #loads: Buckets;
  readonly #connections: Buckets;
  /** Whose message was the last one, and when; and when the last one was of another connection than that. */
  #last: { connection: AdmittedConnection | undefined; at: number } = {
    connection: undefined,
    at: -Infinity,
  };
  #othersAt = -Infinity;

  constructor(private readonly limits: Limits) {
    this.#loads = new Buckets(limits.loadsPerUid);
    this.#connections = new Buckets(limits.connectionsPerUid);
  }

  /** @param open connections that there are */
  admitConnection(uid: number, open: ReadonlyMap<unknown, AdmittedConnection>): boolean {
    const { openConnections, waitingPerUid } = this.limits;
    if (open.size >= openConnections || !this.#connections.take(uid)) return false;
    if (open.size < waitingPerUid) return true;
    const waiting = [...open.values()].filter((other) => other.uid === uid && !other.worker.session);
    return waiting.length < waitingPerUid;
  }

  newBucket(): Bucket {
    return new Bucket(this.limits.saveBytes);
  }

  /** Counts a message. @returns milliseconds until the next one of its stream is read */
  admitMessage(connection: AdmittedConnection, bytes: number): number {
    // A frame of 9 bytes around each 16 KiB, and the windows that the worker opens for its acknowledgement.
    connection.messageBytes += bytes + Math.ceil(bytes / 256) + 256;
    return this.#isShared(connection) ? connection.saves.spend(Math.max(bytes, LEAST_CHARGE_BYTES)) : 0;
  }

  /** Whether another connection has had a message of late. */
  #isShared(connection: AdmittedConnection): boolean {
    const now = performance.now();
    if (this.#last.connection !== connection) {
      this.#othersAt = this.#last.at;
      this.#last = { connection, at: now };
    }
    this.#last.at = now;
    return now - this.#othersAt < SHARED_MS;
  }

  /** Whether what a connection sends is something else than its messages. */
  isNoise({ open, messageBytes, received }: AdmittedConnection): boolean {
    const { otherBytes, transportBytes } = this.limits;
    return (
      received() - messageBytes > otherBytes + open * ((MESSAGES_AHEAD + 1) * transportBytes + WINDOW_BYTES)
    );
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
    const { loadsPerConnection } = this.limits;
    connection.loads += 1;
    if (connection.loads > loadsPerConnection) {
      throw new ManagerError(
        'rate-limited',
        `this connection has made ${loadsPerConnection} Loads; connect again`,
      );
    }
  }

  /** A Load of which it is known that its ticket is signed by who may. @throws ManagerError `rate-limited` */
  admitSigned(connection: AdmittedConnection): void {
    if (!this.#loads.take(connection.uid)) {
      throw new ManagerError('rate-limited', 'too many Loads at once from this user; try again in a moment');
    }
  }
}

/**
 * @param body may take more time than others, which it says by what it is given
 * @throws ManagerError `deadline`; what `body` began goes on without the caller
 */
export function within<T>(
  milliseconds: number,
  body: (extend: (milliseconds: number) => void) => Promise<T>,
): Promise<T> {
  return new Promise((resolve, reject) => {
    const late = (): void => {
      reject(
        new ManagerError(
          'deadline',
          `the Load was not done within ${milliseconds} ms; whether it was is told by the next one, with a new ticket`,
        ),
      );
    };
    let timer = setTimeout(late, milliseconds);
    const extend = (more: number): void => {
      clearTimeout(timer);
      timer = setTimeout(late, milliseconds + more);
    };
    const settled = (): void => clearTimeout(timer);
    // What `body` throws at once is a rejection too.
    const run = async (): Promise<T> => body(extend);
    run().then(resolve, reject).finally(settled);
  });
}

/** What a message costs at least: a Save takes a place in a commit, however small it is. */
const LEAST_CHARGE_BYTES = 16 * 1024;
/** Milliseconds for which a connection that was active counts for one that shares the manager. */
const SHARED_MS = 1000;
/** Messages that are read of a stream while one of it is worked on. */
export const MESSAGES_AHEAD = 2;
/** What HTTP/2 lets a stream send before it is read (RFC 9113 section 6.9.2). */
const WINDOW_BYTES = 65_535;

/** A token bucket. */
export class Bucket {
  #tokens: number;
  #at = performance.now();

  constructor(private readonly rate: Rate) {
    this.#tokens = rate.burst;
  }

  /** Takes one where there is one. */
  take(): boolean {
    this.#fill();
    if (this.#tokens < 1) return false;
    this.#tokens -= 1;
    return true;
  }

  /** Takes `count`, there or not. @returns milliseconds until none is owed */
  spend(count: number): number {
    this.#fill();
    this.#tokens -= count;
    return Math.max(0, (-1000 * this.#tokens) / this.rate.perSecond);
  }

  #fill(): void {
    const now = performance.now();
    const { burst, perSecond } = this.rate;
    this.#tokens = Math.min(burst, this.#tokens + ((now - this.#at) / 1000) * perSecond);
    this.#at = now;
  }
}

/** One for each uid. Only root and the manager's own uid get here. */
class Buckets {
  readonly #buckets = new Map<number, Bucket>();

  constructor(private readonly rate: Rate) {}

  take(uid: number): boolean {
    const bucket = this.#buckets.get(uid) ?? new Bucket(this.rate);
    this.#buckets.set(uid, bucket);
    return bucket.take();
  }
}
