import { VtpmdError } from '../error.js';
import { checkFrame, errorResponse, HEADER_BYTES, MAX_COMMAND_BYTES, TPM_RC_SUCCESS } from './command.js';
import type { EngineState, Locality, Processed, Snapshot, TpmEngine } from './engine.js';
import {
  allocate,
  type BufferSizes,
  type Libtpms,
  loadLibtpms,
  TPM_SUCCESS,
  viewOf,
  writePointer,
  writeU32,
} from './libtpms.js';
import { Nvram } from './nvram.js';

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

/** The TPM of libtpms, of which a process has one at a time. @throws VtpmdError `libtpms-missing`, `engine` */
export function createLibtpmsEngine(): TpmEngine {
  if (exists) throw new VtpmdError('engine', 'there is a TPM in this process already');
  const library = loadLibtpms();
  if (!registered) {
    library.registerCallbacks(nvram);
    registered = true;
  }
  exists = true;
  return new LibtpmsEngine(library);
}

class LibtpmsEngine implements TpmEngine {
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
