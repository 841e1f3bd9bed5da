/** What a worker may use. Part of the worker image's digest. */
export const LIMITS = {
  /**
   * Resource limits as prlimit(1) and getrlimit(2) name them, with the row of /proc/pid/limits that shows them. Soft and
   * hard: raising one again takes a capability that a worker has not.
   */
  resources: [
    { option: 'core', value: 0, row: 'Max core file size' },
    // Nothing that it can write to is a file.
    { option: 'fsize', value: 0, row: 'Max file size' },
    { option: 'memlock', value: 0, row: 'Max locked memory' },
    { option: 'msgqueue', value: 0, row: 'Max msgqueue size' },
    // Guests' connections.
    { option: 'nofile', value: 1024, row: 'Max open files' },
    // Private memory that was asked for, used or not: the V8 of Node.js 24 reserves 512 MiB for machine code.
    { option: 'data', value: 768 * 1024 * 1024, row: 'Max data size' },
  ],
  /** Threads and processes of its uid; only where it has one of its own. */
  ownUidProcesses: { option: 'nproc', value: 64, row: 'Max processes' },
  cgroup: {
    /** An idle worker has 14 MiB; a read-only page of node is charged to whoever touched it first. */
    memoryBytes: 256 * 1024 * 1024,
    /** bubblewrap's two processes, and node with its threads. */
    processes: 64,
    /** Microseconds of processor time in each 100,000. */
    cpuQuota: 100_000,
    cpuPeriod: 100_000,
  },
} as const;
