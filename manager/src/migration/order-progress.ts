import type { MigrateCheck, MigratePhase } from 'vtpm-proto';
import type { ManagerError } from '../error.js';
import type { SourceAt } from './machine.js';

/** What is told of a migration while it goes on. */
export interface SourceProgress {
  readonly phase: MigratePhase;
  readonly bytesSent: bigint;
  readonly bytesTotal: bigint;
  readonly downtimeUs: bigint;
  readonly elapsedUs: bigint;
  readonly reason: string;
  readonly message: string;
  /** Of a dry run, at its end. */
  readonly checks: MigrateCheck[];
}

/** The toolstack that gave the order. */
export interface Orderer {
  progress(progress: SourceProgress): void;
  /** Resolves when it has said that nothing of the worker can run any more. Rejects when it is gone. */
  readonly reaped: Promise<void>;
  /** It takes the order back. Once the departure is written the destination is asked for an end, and has the last word. */
  readonly cancelled: AbortSignal;
}

/** What the toolstack is told on entering a state. */
const PHASE: Readonly<Partial<Record<SourceAt, MigratePhase>>> = {
  connecting: 'CONNECTING',
  greeting: 'ATTESTING',
  preparing: 'PREPARING',
  prepared: 'PREPARED',
  freezing: 'FREEZING',
  departing: 'FROZEN',
  sending: 'SENDING',
  deciding: 'DECIDING',
  checked: 'PREPARED',
  committed: 'COMMITTED',
  aborted: 'ABORTED',
  'in-doubt': 'IN_DOUBT',
};

/** What a toolstack is told of its order. */
export class OrderProgress {
  readonly #began = performance.now();
  #frozenAt: number | undefined;
  #downtimeUs = 0n;
  #sent = 0n;
  #total = 0n;
  readonly #checks: MigrateCheck[] = [];

  constructor(private readonly orderer: Pick<Orderer, 'progress'>) {}

  check(name: string, detail: string): void {
    this.#checks.push({ name, detail });
  }

  bytes(sent: number, total: number): void {
    this.#sent = BigInt(sent);
    this.#total = BigInt(total);
  }

  /** The guest waits from now on. */
  frozen(): void {
    this.#frozenAt = performance.now();
  }

  /** It waits no longer, here or there: the first time counts. */
  goesOn(): void {
    this.#downtimeUs ||= this.#downtime();
  }

  tell(state: { readonly at: SourceAt; readonly reason?: ManagerError }): void {
    const phase = PHASE[state.at];
    if (!phase) return;
    this.orderer.progress({
      phase,
      bytesSent: this.#sent,
      bytesTotal: this.#total,
      downtimeUs: this.#downtimeUs || this.#downtime(),
      elapsedUs: micros(performance.now() - this.#began),
      reason: state.reason?.code ?? '',
      message: state.reason?.message ?? '',
      checks: state.at === 'checked' ? this.#checks : [],
    });
  }

  #downtime(): bigint {
    return this.#frozenAt === undefined ? 0n : micros(performance.now() - this.#frozenAt);
  }
}

function micros(milliseconds: number): bigint {
  return BigInt(Math.round(milliseconds * 1000));
}
