import { Counter, Gauge, Histogram, Registry } from 'prom-client';

const registry = new Registry();

/** A count that costs an addition where it is made, also once for each Save. */
class Tally {
  #count = 0;

  constructor(name: string, help: string) {
    const read = (): number => this.#count;
    new Counter({
      name,
      help,
      registers: [registry],
      collect() {
        this.reset();
        this.inc(read());
      },
    });
  }

  add(count = 1): void {
    this.#count += count;
  }
}

/** Counts by one label, whose values come from the code. */
function counter(name: string, help: string, label: string): (value: string) => void {
  const made = new Counter({ name, help, labelNames: [label], registers: [registry] });
  return (value) => made.inc({ [label]: value });
}

const saves = new Counter({
  name: 'vtpm_saves_total',
  help: 'Saves of workers by how they were answered: committed, repeated, or the reason of a refusal',
  labelNames: ['result'],
  registers: [registry],
  collect() {
    this.remove({ result: 'committed' });
    this.inc({ result: 'committed' }, committed);
  },
});
let committed = 0;

/**
 * What the manager counts of what it does. Of one process: a scrape after a restart begins at 0, as Prometheus expects.
 * Whoever has something to count calls one of these in one line.
 */
export const metrics = {
  /** @param result `granted`, or the code of the refusal */
  load: counter(
    'vtpm_loads_total',
    'Loads of workers by how they were answered: granted, or the reason of a refusal',
    'result',
  ),
  saveCommitted(bytes: number): void {
    committed += 1;
    saveBytes.add(bytes);
  },
  /** @param result `repeated`, or the code of the refusal */
  saveAnswered(result: string): void {
    saves.inc({ result });
  },
  /** @param writes in one commit of the store @param seconds that it took */
  commit(writes: number, seconds: number): void {
    commitWrites.observe(writes);
    commitSeconds.observe(seconds);
  },
  /** @param result `admitted`, or why it was closed before anything of it was read */
  peerConnection: counter(
    'vtpm_peer_connections_total',
    'Connections of other hosts: admitted, or why they were closed before anything of them was read',
    'result',
  ),
  anchorStep: new Tally('vtpm_anchor_steps_total', "Steps of the TPM's counter that were taken"),
  anchorFailure: new Tally(
    'vtpm_anchor_step_failures_total',
    "Attempts to advance the TPM's counter that failed and are tried again",
  ),
  tpmCommand: new Tally('vtpm_tpm_commands_total', "Commands that were sent to the host's TPM"),
  /** @param code of the response in hex, `none` where no answer came */
  tpmError: counter(
    'vtpm_tpm_command_errors_total',
    "Commands that the host's TPM did not answer with success, retries included, by response code",
    'code',
  ),
} as const;

const saveBytes = new Tally('vtpm_save_bytes_total', 'Bytes of the states that were committed');
const commitWrites = new Histogram({
  name: 'vtpm_commit_writes',
  help: 'Records written in one commit of the store',
  buckets: [1, 2, 4, 8, 16, 32, 64, 128, 256],
  registers: [registry],
});
const commitSeconds = new Histogram({
  name: 'vtpm_commit_duration_seconds',
  help: 'Time of one commit of the store, until it is durable',
  buckets: [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2, 10],
  registers: [registry],
});

/** What is so at the moment of a scrape. Unix seconds; undefined: not now, or not known while the manager is locked. */
export interface MetricsState {
  /** The code of the reason; undefined while it is not locked. */
  readonly lockedReason: string | undefined;
  readonly isReady: boolean;
  readonly vtpms: { readonly live: number; readonly retired: number; readonly moved: number } | undefined;
  readonly connectedWorkers: number | undefined;
  readonly storeRecords: number | undefined;
  readonly treeBytes: number | undefined;
  readonly auditEntries: number | undefined;
  readonly anchorPendingSince: number | undefined;
  readonly anchorStalledSince: number | undefined;
  readonly isRotating: boolean | undefined;
  readonly rootKeyGeneration: number | undefined;
  readonly erasurePendingSince: number | undefined;
}

function gauge(name: string, help: string): (value: number | undefined) => void {
  const made = new Gauge({ name, help, registers: [registry] });
  // One that says nothing is not there, which is not 0.
  return (value) => (value === undefined ? made.remove() : made.set(value));
}

const vtpmsByKind = new Gauge({
  name: 'vtpm_vtpms',
  help: 'vTPMs in the store, and tombstones of retired ones and of those that moved to other hosts',
  labelNames: ['kind'],
  registers: [registry],
});
const locked = new Gauge({
  name: 'vtpm_locked',
  help: '1 with the reason while the manager is locked; absent otherwise',
  labelNames: ['reason'],
  registers: [registry],
});
const gauges = {
  ready: gauge('vtpm_ready', '1 while the manager serves workers'),
  connectedWorkers: gauge('vtpm_connected_workers', 'Workers whose Save stream is open'),
  storeRecords: gauge('vtpm_store_records', 'Records in the store'),
  treeBytes: gauge('vtpm_tree_bytes', 'Bytes of the tables of the tree over all records, in memory'),
  auditEntries: gauge('vtpm_audit_entries', 'Entries of the audit log'),
  anchorPendingSince: gauge(
    'vtpm_anchor_pending_since_seconds',
    'Unix time of the oldest write that the TPM has not counted; absent where there is none',
  ),
  anchorStalledSince: gauge(
    'vtpm_anchor_stalled_since_seconds',
    "Unix time since when the TPM's counter cannot be advanced; absent where it can",
  ),
  rotating: gauge('vtpm_rotation_running', '1 while the root key is rotated'),
  rootKeyGeneration: gauge('vtpm_root_key_generation', 'Generation of the root key'),
  erasurePendingSince: gauge(
    'vtpm_erasure_pending_since_seconds',
    'Unix time of the oldest retirement whose state old disks still open; absent where there is none',
  ),
  heap: gauge('vtpm_heap_used_bytes', "Bytes of the process's JavaScript heap in use"),
  external: gauge('vtpm_external_memory_bytes', 'Bytes of buffers outside that heap'),
  resident: gauge('process_resident_memory_bytes', 'Resident memory of the process'),
  startTime: gauge('process_start_time_seconds', 'Unix time of the start of the process'),
};

export const METRICS_TYPE = registry.contentType;

/** The Prometheus text format. Looks at nothing but what is handed over: the cost does not grow with the vTPMs. */
export async function renderMetrics(state: MetricsState): Promise<string> {
  vtpmsByKind.reset();
  if (state.vtpms) {
    vtpmsByKind.set({ kind: 'live' }, state.vtpms.live);
    vtpmsByKind.set({ kind: 'retired' }, state.vtpms.retired);
    vtpmsByKind.set({ kind: 'moved' }, state.vtpms.moved);
  }
  locked.reset();
  if (state.lockedReason !== undefined) locked.set({ reason: state.lockedReason }, 1);
  gauges.ready(state.isReady ? 1 : 0);
  gauges.connectedWorkers(state.connectedWorkers);
  gauges.storeRecords(state.storeRecords);
  gauges.treeBytes(state.treeBytes);
  gauges.auditEntries(state.auditEntries);
  gauges.anchorPendingSince(state.anchorPendingSince);
  gauges.anchorStalledSince(state.anchorStalledSince);
  gauges.rotating(state.isRotating === undefined ? undefined : Number(state.isRotating));
  gauges.rootKeyGeneration(state.rootKeyGeneration);
  gauges.erasurePendingSince(state.erasurePendingSince);
  const { heapUsed, external, rss } = process.memoryUsage();
  gauges.heap(heapUsed);
  gauges.external(external);
  gauges.resident(rss);
  gauges.startTime(Date.now() / 1000 - process.uptime());
  return await registry.metrics();
}
