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
  /** Random, new in each process. */
  readonly instance: string;
}
