import type { BufferSizes } from './libtpms.js';

/** What a TPM is started from. */
export interface EngineState {
  /** Permanent state; absent only together with `manufacture`. */
  readonly permanent?: Uint8Array | undefined;
  /** Volatile state of the same VM run. */
  readonly volatile?: Uint8Array | undefined;
  /** Allows a new TPM to be made. Without it absent state is an error, never a new identity. */
  readonly manufacture: boolean;
}

/** Where a command comes from, as the platform says (part 1, section 33); 4 is the dynamic root of trust's. */
export type Locality = 0 | 1 | 2 | 3 | 4;

export function isLocality(value: number): value is Locality {
  return Number.isInteger(value) && value >= 0 && value <= 4;
}

export interface Processed {
  /** A view that is valid until the next command. */
  readonly response: Buffer;
  /** The whole permanent state, where this command changed it. */
  readonly stored: Buffer | undefined;
}

/** All that a running TPM is, at one moment. Holds its secrets: `discard` wipes them. */
export interface Snapshot {
  readonly permanent: Buffer;
  readonly volatile: Buffer;
}

export function discard(snapshot: Snapshot): void {
  snapshot.permanent.fill(0);
  snapshot.volatile.fill(0);
}

/** The one TPM of this process: libtpms keeps all its state in globals. */
export interface TpmEngine {
  readonly libtpmsVersion: string;
  /** False between `powerOff` and `powerOn`. Only what says so can be called then. */
  readonly isOn: boolean;
  /** A dynamic root of trust was measured; as it was when the TPM was last asked. */
  readonly established: boolean;
  /** Permanent state stored while the TPM was powered on for the last time, where it was. */
  readonly storedAtStart: Buffer | undefined;
  /** Of the TPM that is on, or of the next one that is. */
  readonly bufferSizes: BufferSizes;
  /** Only while it is off; the nearest size that is possible. */
  setBufferSize(wanted: number): void;
  /** What TPMLIB_GetInfo says, on or off: JSON. */
  info(flags: number): string;
  /** Cuts the power. @returns the permanent state, whose wiping is the caller's @throws VtpmdError `engine` where it is off */
  powerOff(): Buffer;
  /** _TPM_Init, while it is off. @throws VtpmdError `engine`; it stays off */
  powerOn(state: EngineState): void;
  /**
   * _TPM_Hash_Start, _TPM_Hash_Data and _TPM_Hash_End (part 1, section 34): the measurement of a dynamic root of trust. Any
   * command in between ends it without an effect. @returns what it stored
   */
  hash(step: 'start' | 'end' | Uint8Array): Buffer | undefined;
  /** Forgets that one was measured. @returns false where the TPM does not take it from this locality */
  resetEstablished(locality: Locality): boolean;
  /** Runs one command at a locality. A badly framed one is answered without libtpms. @throws VtpmdError `engine` */
  process(command: Uint8Array, locality?: Locality): Processed;
  /** The same on another thread. No other call until it resolves, `cancel` excepted. */
  processAsync(command: Uint8Array, locality?: Locality): Promise<Processed>;
  cancel(): void;
  /** Whether an operator is physically present (part 1, section 34); not before it is said so. */
  setPhysicalPresence(isAsserted: boolean): void;
  /** A copy of the volatile state. */
  volatileState(): Buffer;
  /** As `volatileState`, without the copy: what `use` gets is wiped and gone when it returns. */
  useVolatileState<T>(use: (content: Buffer) => T): T;
  snapshot(): Snapshot;
  /**
   * Makes the TPM what it was at the snapshot: objects, sessions, PCRs, counters and clock. Its generator would give the
   * same random numbers once more: TPM2_StirRandom is the caller's. @throws VtpmdError `engine`; there is no TPM then
   */
  restore(snapshot: Snapshot): void;
  /** Powers the TPM off; the engine cannot be used again. */
  terminate(): void;
}
