import { concat, u32Bytes } from '../bytes.js';
import { TpmError } from '../error.js';
import { connectStream, type Endpoint, type SocketOptions, type Stream, StreamTransport } from './stream.js';
import {
  type ControlRequest,
  controlFraming,
  DELETE_VOLATILE,
  decodeControl,
  encodeControl,
} from './swtpm-control.js';
import { type Transport, throwIfAborted, transportError } from './transport.js';

/**
 * A swtpm with its control channel. Commands and control operations take turns; only `cancel` does not wait for the
 * command under way. An operation that swtpm refuses is a TpmError `transport` that names it and the result, and harms
 * nothing; after any other failure of one of the two connections both are closed.
 */
export interface SwtpmTransport extends Transport {
  cancel(): Promise<void>;
  /** Bits of `ControlCapability`. */
  capabilities(): Promise<number>;
  /**
   * Powers the TPM on, or off and on where it ran: a TPM Reset once TPM2_Startup follows (it does not by itself, whatever
   * `--flags` say). Sessions and objects that were loaded are gone, unless volatile state was stored.
   * @param options.deleteVolatile removes the stored volatile state once it was read
   */
  init(options?: { readonly deleteVolatile?: boolean }): Promise<void>;
  /** Powers the TPM off; the process stays. Commands are answered with TPM_RC_FAILURE until `init`. */
  stop(): Promise<void>;
  /** `stop`, then `init`: what a power cycle of the machine does. TPM2_Startup has to follow. */
  powerCycle(): Promise<void>;
  /** Ends the swtpm process, and with it this transport. */
  shutdown(): Promise<void>;
  /** The locality of the commands that follow, 0 to 4. */
  setLocality(locality: number): Promise<void>;
  /** True where a D-RTM measurement was made since the bit was reset (TPM_ACCESS_x.tpmEstablishment). */
  established(): Promise<boolean>;
  /** Clears that bit. @param locality who asks; TPMs grant it to 3 and 4 */
  resetEstablished(locality: number): Promise<void>;
  /**
   * A D-RTM measurement from locality 4: resets PCR 17 and extends it with the digest of `data` (the dynamic root
   * of trust, through the interface commands _TPM_Hash_Start, _Data and _End). Before TPM2_Startup it is the
   * H-CRTM's, in PCR 0.
   */
  hash(data: Uint8Array): Promise<void>;
}

export interface SwtpmEndpoints {
  /** `--server`: commands. */
  readonly data: Endpoint;
  /** `--ctrl`. It has one client at a time, as the data channel has. */
  readonly control: Endpoint;
}

/** @throws TpmError `transport` where nobody accepts one of the connections */
export async function openSwtpm(
  endpoints: SwtpmEndpoints,
  options: SocketOptions = {},
): Promise<SwtpmTransport> {
  const control = await connectStream(endpoints.control, options);
  try {
    return new Swtpm(await connectStream(endpoints.data, options), control);
  } catch (error) {
    control.fail('closed');
    throw error;
  }
}

class Swtpm implements SwtpmTransport {
  readonly #commands: StreamTransport;
  /** The command or operation that is on, or has been before. */
  #last: Promise<unknown> = Promise.resolve();
  #isExecuting = false;
  #canceling: Promise<void> | undefined;

  constructor(
    private readonly data: Stream,
    private readonly control: Stream,
  ) {
    this.#commands = new StreamTransport(data);
    data.onFailure(() => control.fail('the data channel failed'));
    control.onFailure(() => data.fail('the control channel failed'));
  }

  transmit(command: Uint8Array, signal?: AbortSignal): Promise<Buffer> {
    return this.#inTurn(async () => {
      throwIfAborted(signal);
      this.#isExecuting = true;
      try {
        return await this.#commands.transmit(command);
      } finally {
        this.#isExecuting = false;
      }
    });
  }

  async cancel(): Promise<void> {
    if (!this.#isExecuting) return;
    this.#canceling ??= this.#ask({ name: 'CANCEL_TPM_CMD', answer: 0 }).then(() => undefined);
    await this.#canceling;
  }

  async capabilities(): Promise<number> {
    return (await this.#operate({ name: 'GET_CAPABILITY', answer: 4 })).readUInt32BE(0);
  }

  async init(options: { readonly deleteVolatile?: boolean } = {}): Promise<void> {
    await this.#operate(initRequest(options.deleteVolatile ?? false));
  }

  async stop(): Promise<void> {
    await this.#operate({ name: 'STOP', answer: 0 });
  }

  powerCycle(): Promise<void> {
    return this.#inTurn(async () => {
      await this.#ask({ name: 'STOP', answer: 0 });
      await this.#ask(initRequest(false));
    });
  }

  async shutdown(): Promise<void> {
    await this.#operate({ name: 'SHUTDOWN', answer: 0 });
    await this.close();
  }

  async setLocality(locality: number): Promise<void> {
    await this.#operate({ name: 'SET_LOCALITY', body: localityByte(locality), answer: 0 });
  }

  async established(): Promise<boolean> {
    // The bit, then three bytes of padding.
    const bit = (await this.#operate({ name: 'GET_TPMESTABLISHED', answer: 4 })).readUInt8(0);
    if (bit > 1) throw transportError(`swtpm control: CMD_GET_TPMESTABLISHED was answered with ${bit}`);
    return bit === 1;
  }

  async resetEstablished(locality: number): Promise<void> {
    await this.#operate({ name: 'RESET_TPMESTABLISHED', body: localityByte(locality), answer: 0 });
  }

  hash(data: Uint8Array): Promise<void> {
    return this.#inTurn(async () => {
      await this.#ask({ name: 'HASH_START', answer: 0 });
      if (data.length > 0) {
        await this.#ask({ name: 'HASH_DATA', body: concat(u32Bytes(data.length), data), answer: 0 });
      }
      await this.#ask({ name: 'HASH_END', answer: 0 });
    });
  }

  async close(): Promise<void> {
    this.data.fail('closed');
  }

  #operate(request: ControlRequest): Promise<Buffer> {
    return this.#inTurn(() => this.#ask(request));
  }

  async #ask(request: ControlRequest): Promise<Buffer> {
    const answer = await this.control.exchange(encodeControl(request), controlFraming(request));
    return decodeControl(request, answer);
  }

  #inTurn<T>(body: () => Promise<T>): Promise<T> {
    const turn = this.#last.then(body);
    // swtpm reads a request to cancel when the command is over already. The next command must not come before that.
    const over = turn.catch(() => undefined).then(() => this.#canceling?.catch(() => undefined));
    this.#last = over.then(() => {
      this.#canceling = undefined;
    });
    return turn;
  }
}

function initRequest(deleteVolatile: boolean): ControlRequest {
  return { name: 'INIT', body: u32Bytes(deleteVolatile ? DELETE_VOLATILE : 0), answer: 0 };
}

function localityByte(locality: number): Uint8Array {
  if (!Number.isInteger(locality) || locality < 0 || locality > 4) {
    throw new TpmError('usage', `locality ${locality}: localities are 0 to 4`);
  }
  return Uint8Array.of(locality);
}
