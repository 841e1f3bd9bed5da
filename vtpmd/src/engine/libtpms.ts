import { koffi } from 'vtpm-common/libc';
import { VtpmdError } from '../error.js';

/** Results of libtpms (tpm_error.h). */
export const TPM_SUCCESS = 0;
export const TPM_FAIL = 9;
export const TPM_BAD_VERSION = 0x2e;
export const TPM_RETRY = 0x800;

/** Of TPMLIB_BlobName and TPMLIB_StateType (tpm_library.h). */
const STATE_PERMANENT = 1;
const STATE_VOLATILE = 2;

/** TPMLIB_TPMVersion (tpm_library.h). */
const TPM_1_2 = 0;
const TPM_2_0 = 1;

/** What libtpms calls back with. Each must return a result and never throw. */
export interface Callbacks {
  /** `data` (u8**) and `length` (u32*) receive memory from `allocate`, which libtpms frees. */
  load(data: bigint, length: bigint, name: string): number;
  store(data: bigint, length: number, name: string): number;
  remove(name: string): number;
}

/** Bytes that commands and responses may have: now, at least and at most. */
export interface BufferSizes {
  readonly size: number;
  readonly least: number;
  readonly most: number;
}

/** The functions of libtpms.so.0 that a TPM 2.0 needs (tpm_library.h). Pointers are addresses. */
export interface Libtpms {
  readonly version: string;
  registerCallbacks(callbacks: Callbacks): void;
  mainInit(): number;
  terminate(): void;
  process(response: bigint, size: bigint, capacity: bigint, command: bigint, length: number): number;
  processAsync(
    response: bigint,
    size: bigint,
    capacity: bigint,
    command: bigint,
    length: number,
  ): Promise<number>;
  /** Commands that start from now on are at this locality, 0 to 4. 0 before the first call. */
  setLocality(locality: number): void;
  /** Whether an operator is physically present, for commands that ask; false before the first call. */
  setPhysicalPresence(isAsserted: boolean): void;
  /** Asks a command that runs on another thread to end early; few commands look. */
  cancelCommand(): void;
  /** TPM_IO_TpmEstablished_Get: whether a dynamic root of trust was measured. */
  isEstablished(): boolean;
  /** TPM_IO_TpmEstablished_Reset, from the locality that the TPM asks for. */
  resetEstablished(): number;
  /** TPM_IO_Hash_Start, _Data and _End (tpm_tis.h): what _TPM_Hash_Start and so on are. The TPM must be on. */
  hashStart(): number;
  hashData(content: Uint8Array): number;
  hashEnd(): number;
  /** TPMLIB_SetBufferSize; 0 asks. Not while the TPM is on. */
  setBufferSize(wanted: number): BufferSizes;
  /** TPMLIB_GetInfo: JSON. */
  info(flags: number): string;
  /**
   * TPMLIB_SetState, which reads states without using them; none is kept. Not while the TPM is on.
   * @returns the first result that is not TPM_SUCCESS
   */
  testState(permanent: Uint8Array, volatile: Uint8Array | undefined): number;
  /** A copy of the permanent state, as the `store` callback gets it. */
  permanentState(): Buffer;
  /** A copy of the volatile state. */
  volatileState(): Buffer;
  /** The volatile state itself, which is wiped and gone when `use` returns. */
  useVolatileState<T>(use: (content: Buffer) => T): T;
}

/** `length` bytes of libc's heap. TPM_Malloc will not do: it gives 64 KiB at most. */
export function allocate(length: number): bigint {
  const address = malloc(length) as bigint | null;
  if (address === null) throw new VtpmdError('engine', `no memory for ${length} bytes`);
  return address;
}

/** The memory at `address`. Valid until it is freed. */
export function viewOf(address: bigint, length: number): Buffer {
  return Buffer.from(koffi.view(address, length));
}

export function writePointer(address: bigint, value: bigint): void {
  koffi.encode(address, 'uint64_t', value);
}

export function writeU32(address: bigint, value: number): void {
  koffi.encode(address, 'uint32_t', value);
}

const libc = koffi.load('libc.so.6');
const malloc = libc.func('void *malloc(size_t size)');
const free = libc.func('void free(void *memory)');
const strlen = libc.func('size_t strlen(void *text)');

let loaded: Libtpms | undefined;

/**
 * Loads the library once. `deep` is a must: Node exports its own OpenSSL, and without RTLD_DEEPBIND libtpms and the
 * system's libcrypto bind to that.
 * @throws VtpmdError `libtpms-missing`
 */
export function loadLibtpms(): Libtpms {
  loaded ??= bind();
  return loaded;
}

function bind(): Libtpms {
  let library: ReturnType<typeof koffi.load>;
  try {
    library = koffi.load('libtpms.so.0', { deep: true });
  } catch (cause) {
    throw new VtpmdError(
      'libtpms-missing',
      'libtpms.so.0 is not installed; on Debian: apt-get install libtpms0',
      { cause },
    );
  }
  const number = Number(library.func('uint32_t TPMLIB_GetVersion(void)')());
  const choose = library.func('uint32_t TPMLIB_ChooseTPMVersion(int version)');
  const register = library.func('uint32_t TPMLIB_RegisterCallbacks(void *callbacks)');
  const mainInit = library.func('uint32_t TPMLIB_MainInit(void)');
  const terminate = library.func('void TPMLIB_Terminate(void)');
  const process = library.func(
    'uint32_t TPMLIB_Process(void *response, void *size, void *capacity, void *command, uint32_t length)',
  );
  const cancel = library.func('uint32_t TPMLIB_CancelCommand(void)');
  const established = library.func('uint32_t TPM_IO_TpmEstablished_Get(_Out_ uint8_t *bit)');
  const reset = library.func('uint32_t TPM_IO_TpmEstablished_Reset(void)');
  const hashStart = library.func('uint32_t TPM_IO_Hash_Start(void)');
  const hashData = library.func('uint32_t TPM_IO_Hash_Data(void *content, uint32_t length)');
  const hashEnd = library.func('uint32_t TPM_IO_Hash_End(void)');
  const setBufferSize = library.func(
    'uint32_t TPMLIB_SetBufferSize(uint32_t wanted, _Out_ uint32_t *least, _Out_ uint32_t *most)',
  );
  const getInfo = library.func('void *TPMLIB_GetInfo(int flags)');
  const getState = library.func(
    'uint32_t TPMLIB_GetState(int type, _Out_ uint64_t *data, _Out_ uint32_t *length)',
  );
  const setState = library.func('uint32_t TPMLIB_SetState(int type, const void *data, uint32_t length)');
  const volatileStore = library.func('uint32_t TPMLIB_VolatileAll_Store(void *data, void *length)');
  // For the calls that are made for each command: fixed memory is cheaper to pass than arrays.
  const result = allocate(16);
  const resultFields = viewOf(result, 16);
  const takeCopy = (what: string, ask: (data: bigint[], length: number[]) => unknown): Buffer => {
    const data = [0n];
    const length = [0];
    check(what, Number(ask(data, length)));
    const address = BigInt(data[0] ?? 0n);
    const content = viewOf(address, length[0] ?? 0);
    const copy = Buffer.from(content);
    // The state holds seeds and keys: none stays behind on the heap.
    content.fill(0);
    free(address);
    return copy;
  };
  const useVolatileState = <T>(use: (content: Buffer) => T): T => {
    check('TPMLIB_VolatileAll_Store', Number(volatileStore(result, result + 8n)));
    const address = resultFields.readBigUInt64LE(0);
    const content = viewOf(address, resultFields.readUInt32LE(8));
    try {
      return use(content);
    } finally {
      content.fill(0);
      free(address);
    }
  };
  let table: CallbackTable | undefined;
  const changeTable = (change: (table: CallbackTable) => void): void => {
    if (!table) throw new VtpmdError('engine', 'there is no TPM whose platform this could be');
    change(table);
    check('TPMLIB_RegisterCallbacks', Number(register(table.bytes)));
  };
  return {
    version: `${(number >> 16) & 0xff}.${(number >> 8) & 0xff}.${number & 0xff}`,
    registerCallbacks(callbacks) {
      check('TPMLIB_ChooseTPMVersion', Number(choose(TPM_2_0)));
      table = callbackTable(callbacks);
      check('TPMLIB_RegisterCallbacks', Number(register(table.bytes)));
    },
    mainInit: () => Number(mainInit()),
    terminate: () => void terminate(),
    process: (response, size, capacity, command, length) =>
      Number(process(response, size, capacity, command, length)),
    processAsync: (response, size, capacity, command, length) =>
      new Promise((resolve, reject) => {
        process.async(
          response,
          size,
          capacity,
          command,
          length,
          (error: Error | null, result: number): void => (error ? reject(error) : resolve(Number(result))),
        );
      }),
    setLocality: (locality) => changeTable((of) => of.setLocality(locality)),
    setPhysicalPresence: (isAsserted) => changeTable((of) => of.setPhysicalPresence(isAsserted)),
    cancelCommand: () => void cancel(),
    isEstablished() {
      const bit = [0];
      return Number(established(bit)) === TPM_SUCCESS && bit[0] !== 0;
    },
    resetEstablished: () => Number(reset()),
    hashStart: () => Number(hashStart()),
    hashData: (content) => Number(hashData(content, content.length)),
    hashEnd: () => Number(hashEnd()),
    setBufferSize(wanted) {
      const [least, most] = [[0], [0]];
      const size = Number(setBufferSize(wanted, least, most));
      return { size, least: least[0] ?? 0, most: most[0] ?? 0 };
    },
    info(flags) {
      const address = getInfo(flags) as bigint | null;
      if (address === null) throw new VtpmdError('engine', 'TPMLIB_GetInfo gives nothing');
      const text = viewOf(address, Number(strlen(address))).toString('utf8');
      free(address);
      return text;
    },
    testState(permanent, volatile) {
      try {
        const result = Number(setState(STATE_PERMANENT, permanent, permanent.length));
        if (result !== TPM_SUCCESS || !volatile) return result;
        return Number(setState(STATE_VOLATILE, volatile, volatile.length));
      } finally {
        // Another version of the TPM has no use for what was set: the library forgets it.
        choose(TPM_1_2);
        choose(TPM_2_0);
      }
    },
    permanentState: () =>
      takeCopy('TPMLIB_GetState', (data, length) => getState(STATE_PERMANENT, data, length)),
    volatileState: () => useVolatileState((content) => Buffer.from(content)),
    useVolatileState,
  };
}

function check(what: string, result: number): void {
  if (result !== TPM_SUCCESS) throw new VtpmdError('engine', `${what} failed with ${result}`);
}

interface CallbackTable {
  /** libtpms copies it. */
  readonly bytes: Buffer;
  setLocality(locality: number): void;
  setPhysicalPresence(isAsserted: boolean): void;
}

/** Of io_getlocality and io_getphysicalpresence, among the callbacks. */
const GET_LOCALITY = 5;
const GET_PHYSICAL_PRESENCE = 6;

/**
 * struct libtpms_callbacks on 64-bit Linux: int sizeOfStruct (64 bytes with padding), then seven pointers. The registered
 * functions live as long as the process. io_getlocality is NULL while the locality is 0, which libtpms takes without it, so
 * that the many commands at locality 0 do not come here to ask; so is io_getphysicalpresence while nobody is present.
 */
function callbackTable(callbacks: Callbacks): CallbackTable {
  const initialise = koffi.proto('uint32_t TpmsInit(void)');
  const load = koffi.proto('uint32_t TpmsLoad(void *data, void *length, uint32_t tpm, const char *name)');
  const store = koffi.proto(
    'uint32_t TpmsStore(void *data, uint32_t length, uint32_t tpm, const char *name)',
  );
  const remove = koffi.proto('uint32_t TpmsDelete(uint32_t tpm, const char *name, uint8_t mustExist)');
  const getPresence = koffi.proto('uint32_t TpmsGetPresence(void *isPresent, uint32_t tpm)');
  const getLocality = koffi.proto('uint32_t TpmsGetLocality(void *locality, uint32_t tpm)');
  const address = (callback: (...args: never[]) => number, type: ReturnType<typeof koffi.proto>): bigint =>
    koffi.register(guarded(callback), koffi.pointer(type));
  const table = Buffer.alloc(64);
  table.writeInt32LE(64, 0);
  const entries = [
    address(() => TPM_SUCCESS, initialise),
    address(
      (data: bigint, length: bigint, _tpm: number, name: string) => callbacks.load(data, length, name),
      load,
    ),
    address(
      (data: bigint, length: number, _tpm: number, name: string) => callbacks.store(data, length, name),
      store,
    ),
    address((_tpm: number, name: string) => callbacks.remove(name), remove),
    address(() => TPM_SUCCESS, initialise),
  ];
  entries.forEach((entry, index) => {
    table.writeBigUInt64LE(entry, 8 + 8 * index);
  });
  let current = 0;
  const asked = address((locality: bigint) => {
    writeU32(locality, current);
    return TPM_SUCCESS;
  }, getLocality);
  const present = address((isPresent: bigint) => {
    viewOf(isPresent, 1).writeUInt8(1);
    return TPM_SUCCESS;
  }, getPresence);
  return {
    bytes: table,
    setPhysicalPresence(isAsserted) {
      table.writeBigUInt64LE(isAsserted ? present : 0n, 8 + 8 * GET_PHYSICAL_PRESENCE);
    },
    setLocality(locality) {
      current = locality;
      table.writeBigUInt64LE(locality === 0 ? 0n : asked, 8 + 8 * GET_LOCALITY);
    },
  };
}

/** koffi turns an exception into 0, which libtpms takes for success: it must see a failure. */
function guarded(callback: (...args: never[]) => number): (...args: never[]) => number {
  return (...args) => {
    try {
      return callback(...args);
    } catch {
      return TPM_FAIL;
    }
  };
}
