/** What `GET /health` says. */
export interface Health {
  readonly status: 'starting' | 'ready' | 'locked';
  /** Why it is locked: an error code and its sentence. */
  readonly reason?: string;
  readonly message?: string;
  readonly version: string;
  readonly managerId: string;
  readonly storeId: string;
  readonly tpm: {
    readonly kind: string;
    readonly path: string;
    readonly manufacturer: string;
    readonly hardwareProtected: boolean;
  };
  readonly pcrSelection: string;
  readonly vtpms: number | null;
  /** Undefined while there is no store. Times are ISO 8601, UTC. */
  readonly anchor?: {
    /** Of the oldest write that the TPM has not counted. */
    readonly pendingSince: string | null;
    /** Since when the TPM's counter cannot be advanced. Saves go on; what has to be counted first waits. */
    readonly stalledSince: string | null;
    /** Why: an error code and its sentence. */
    readonly reason?: string;
    readonly message?: string;
  };
  /** Random, new in each process. */
  readonly instance: string;
}
