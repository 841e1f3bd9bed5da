import { VtpmdError } from '../error.js';
import { checkFrame, errorResponse, HEADER_BYTES, MAX_COMMAND_BYTES, TPM_RC_SUCCESS } from './command.js';
import {
  allocate,
  type BufferSizes,
  type Callbacks,
  type Libtpms,
  loadLibtpms,
  TPM_FAIL,
  TPM_RETRY,
  TPM_SUCCESS,
  viewOf,
  writePointer,
  writeU32,
} from './libtpms.js';

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

/** A TPM that is off. @throws VtpmdError `libtpms-missing`, `engine` */
export function createEngine(): TpmEngine {
  if (exists) throw new VtpmdError('engine', 'there is a TPM in this process already');
  const library = loadLibtpms();
  if (!registered) {
    library.registerCallbacks(nvram);
    registered = true;
  }
  exists = true;
  return new Engine(library);
}

/**
 * Powers a TPM on (the equivalent of _TPM_Init; TPM2_Startup is still to be sent).
 * @throws VtpmdError `libtpms-missing`, `state-missing`, `engine`
 */
export function startEngine(state: EngineState): TpmEngine {
  if (!state.permanent && !state.manufacture) {
    throw new VtpmdError('state-missing', 'there is no permanent state, and no permission to make a new TPM');
  }
  if (state.permanent && state.manufacture) {
    throw new VtpmdError('state-exists', 'there is permanent state: a new TPM would replace it');
  }
  const engine = createEngine();
  try {
    engine.powerOn(state);
    return engine;
  } catch (error) {
    engine.terminate();
    throw error;
  }
}

/** Answers libtpms's storage calls from memory: what is durable is decided above, before a response leaves. */
class Nvram implements Callbacks {
  #permanent: Buffer | undefined;
  #volatile: Buffer | undefined;
  #isNew = false;
  #stored: Buffer | undefined;

  begin(state: EngineState): void {
    this.#permanent = state.permanent ? Buffer.from(state.permanent) : undefined;
    this.#volatile = state.volatile ? Buffer.from(state.volatile) : undefined;
    this.#isNew = state.manufacture;
    this.#stored = undefined;
  }

  /** The TPM is on: libtpms has read what it needs. */
  end(): void {
    this.#permanent?.fill(0);
    this.#volatile?.fill(0);
    this.#permanent = this.#volatile = undefined;
    this.#isNew = false;
  }

  takeStored(): Buffer | undefined {
    const stored = this.#stored;
    this.#stored = undefined;
    return stored;
  }

  load(data: bigint, length: bigint, name: string): number {
    // While it makes a TPM, libtpms stores "permall" and loads it again: it must get what it has just stored.
    const content =
      name === 'permall'
        ? (this.#stored ?? this.#permanent)
        : name === 'volatilestate'
          ? this.#volatile
          : undefined;
    if (!content) {
      // TPM_RETRY means "there is none", and for permall it makes libtpms manufacture a new TPM.
      return name === 'permall' && !this.#isNew ? TPM_FAIL : TPM_RETRY;
    }
    const copy = allocate(content.length);
    viewOf(copy, content.length).set(content);
    writePointer(data, copy);
    writeU32(length, content.length);
    return TPM_SUCCESS;
  }

  store(data: bigint, length: number, name: string): number {
    if (name !== 'permall') return TPM_FAIL;
    this.#stored = Buffer.from(viewOf(data, length));
    return TPM_SUCCESS;
  }

  remove(name: string): number {
    if (name === 'volatilestate') this.#volatile = undefined;
    return TPM_SUCCESS;
  }
}

const nvram = new Nvram();
let registered = false;
let exists = false;

// libtpms keeps it over its own restarts.
let locality: Locality = 0;

// Fixed memory for every call: TPMLIB_Process allocates a response buffer for each command that brings none.
let memory: ReturnType<typeof allocateMemory> | undefined;

function allocateMemory() {
  const pointers = allocate(16);
  const response = allocate(MAX_COMMAND_BYTES);
  const command = allocate(MAX_COMMAND_BYTES);
  writePointer(pointers, response);
  writeU32(pointers + 8n, 0);
  writeU32(pointers + 12n, MAX_COMMAND_BYTES);
  return {
    responsePointer: pointers,
    size: pointers + 8n,
    capacity: pointers + 12n,
    fields: viewOf(pointers, 16),
    response,
    responseView: viewOf(response, MAX_COMMAND_BYTES),
    command,
    commandView: viewOf(command, MAX_COMMAND_BYTES),
  };
}

class Engine implements TpmEngine {
  readonly libtpmsVersion: string;
  readonly #library: Libtpms;
  readonly #memory: ReturnType<typeof allocateMemory>;
  #isBusy = false;
  #isOn = false;
  #established = false;
  #storedAtStart: Buffer | undefined;
  #bufferSizes: BufferSizes;

  constructor(library: Libtpms) {
    memory ??= allocateMemory();
    this.#memory = memory;
    this.#library = library;
    this.libtpmsVersion = library.version;
    this.#bufferSizes = library.setBufferSize(MAX_COMMAND_BYTES);
  }

  get isOn(): boolean {
    return this.#isOn;
  }

  get established(): boolean {
    return this.#established;
  }

  get storedAtStart(): Buffer | undefined {
    return this.#storedAtStart;
  }

  get bufferSizes(): BufferSizes {
    return this.#bufferSizes;
  }

  setBufferSize(wanted: number): void {
    if (this.#isOn) throw new VtpmdError('engine', 'the TPM is on: its buffers have the size that they have');
    this.#bufferSizes = this.#library.setBufferSize(wanted);
  }

  info(flags: number): string {
    if (this.#isBusy) throw new VtpmdError('engine', 'the TPM runs a command');
    return this.#library.info(flags);
  }

  powerOn(state: EngineState): void {
    if (this.#isOn) throw new VtpmdError('engine', 'the TPM is on already');
    this.#storedAtStart = undefined;
    this.#library.setBufferSize(this.#bufferSizes.size);
    nvram.begin(state);
    const result = this.#library.mainInit();
    nvram.end();
    if (result !== TPM_SUCCESS) {
      this.#library.terminate();
      throw new VtpmdError('engine', `libtpms does not start from this state (TPMLIB_MainInit: ${result})`);
    }
    this.#isOn = true;
    this.#established = this.#library.isEstablished();
    this.#storedAtStart = nvram.takeStored();
  }

  powerOff(): Buffer {
    this.#expectIdle();
    const permanent = this.#library.permanentState();
    this.#isOn = false;
    this.#library.terminate();
    return permanent;
  }

  hash(step: 'start' | 'end' | Uint8Array): Buffer | undefined {
    this.#expectIdle();
    const result =
      step === 'start'
        ? this.#library.hashStart()
        : step === 'end'
          ? this.#library.hashEnd()
          : this.#library.hashData(step);
    if (result !== TPM_SUCCESS) throw new VtpmdError('engine', `libtpms does not measure (${result})`);
    this.#established = this.#library.isEstablished();
    return nvram.takeStored();
  }

  resetEstablished(at: Locality): boolean {
    this.#expectIdle();
    this.#setLocality(at);
    const result = this.#library.resetEstablished();
    this.#established = this.#library.isEstablished();
    return result === TPM_SUCCESS;
  }

  process(command: Uint8Array, at: Locality = 0): Processed {
    const refused = this.#prepare(command, at);
    if (refused) return refused;
    const m = this.#memory;
    const result = this.#library.process(m.responsePointer, m.size, m.capacity, m.command, command.length);
    return this.#finish(result);
  }

  async processAsync(command: Uint8Array, at: Locality = 0): Promise<Processed> {
    const refused = this.#prepare(command, at);
    if (refused) return refused;
    const m = this.#memory;
    this.#isBusy = true;
    try {
      const result = await this.#library.processAsync(
        m.responsePointer,
        m.size,
        m.capacity,
        m.command,
        command.length,
      );
      return this.#finish(result);
    } finally {
      this.#isBusy = false;
    }
  }

  cancel(): void {
    this.#library.cancelCommand();
  }

  setPhysicalPresence(isAsserted: boolean): void {
    this.#library.setPhysicalPresence(isAsserted);
  }

  volatileState(): Buffer {
    this.#expectIdle();
    return this.#library.volatileState();
  }

  useVolatileState<T>(use: (content: Buffer) => T): T {
    this.#expectIdle();
    return this.#library.useVolatileState(use);
  }

  snapshot(): Snapshot {
    this.#expectIdle();
    return { permanent: this.#library.permanentState(), volatile: this.#library.volatileState() };
  }

  restore({ permanent, volatile }: Snapshot): void {
    this.#expectIdle();
    this.#library.terminate();
    nvram.begin({ permanent, volatile, manufacture: false });
    const result = this.#library.mainInit();
    nvram.end();
    if (result !== TPM_SUCCESS) {
      this.terminate();
      throw new VtpmdError('engine', `libtpms does not take its own state back (TPMLIB_MainInit: ${result})`);
    }
    const stored = nvram.takeStored();
    if (stored && !stored.equals(permanent)) {
      throw new VtpmdError('engine', 'libtpms changed the permanent state that it was given back');
    }
  }

  terminate(): void {
    if (this.#isBusy) throw new VtpmdError('engine', 'the TPM runs another command');
    exists = false;
    if (this.#isOn) this.#library.terminate();
    this.#isOn = false;
  }

  #expectIdle(): void {
    if (!this.#isOn) throw new VtpmdError('engine', 'the TPM is powered off');
    if (this.#isBusy) throw new VtpmdError('engine', 'the TPM runs another command');
  }

  #prepare(command: Uint8Array, at: Locality): Processed | undefined {
    this.#expectIdle();
    const frame = Buffer.isBuffer(command)
      ? command
      : Buffer.from(command.buffer, command.byteOffset, command.length);
    const code = frame.length < HEADER_BYTES ? -1 : checkFrame(frame);
    if (code !== TPM_RC_SUCCESS) {
      if (code === -1) throw new VtpmdError('engine', 'a command without a header cannot be answered');
      return { response: errorResponse(code), stored: undefined };
    }
    this.#setLocality(at);
    this.#memory.commandView.set(command);
    return undefined;
  }

  #setLocality(at: Locality): void {
    if (at === locality) return;
    this.#library.setLocality(at);
    locality = at;
  }

  #finish(result: number): Processed {
    const m = this.#memory;
    if (result !== TPM_SUCCESS) throw new VtpmdError('engine', `TPMLIB_Process failed with ${result}`);
    const address = m.fields.readBigUInt64LE(0);
    if (address !== m.response) {
      // libtpms put another buffer in place; the old one is freed.
      m.response = address;
      m.responseView = viewOf(address, m.fields.readUInt32LE(12));
    }
    return {
      response: m.responseView.subarray(0, m.fields.readUInt32LE(8)),
      stored: nvram.takeStored(),
    };
  }
}
