import { availableParallelism } from 'node:os';
import type { TpmChannel, TransmitOptions } from '../channel.js';
import { lost } from '../client.js';
import type { ConnectOptions } from '../connecting.js';
import { FrontendError } from '../error.js';
import { TransmitQueue } from '../transmit-queue.js';
import { type OpenOptions, RingDevice } from './device.js';
import type { RingPort } from './port.js';

export interface RingOptions extends ConnectOptions, OpenOptions {
  /**
   * `adaptive`: looks at the page for a tenth of a millisecond and then sleeps until the vTPM says something. `spinning`:
   * looks for up to a second, which keeps a processor busy and everything else of this process waiting.
   */
  readonly waits?: 'adaptive' | 'spinning';
}

/** How long the page is looked at before the event loop goes on, in milliseconds. */
const SPIN_MS = { adaptive: 0.1, spinning: 1000 } as const;
/** On a single processor the vTPM could not go on meanwhile. */
const canSpin = availableParallelism() > 1;

/**
 * A ring: pages that are shared with one vTPM on this host. Giving up on the command that is on its way asks the vTPM to give
 * it up. With `signal` the promise then settles with what became of it: the TPM's answer where it ran, `aborted` where it did
 * not. With `deadline` it rejects at once, and the next command waits until the vTPM has let go of this one.
 *
 * @example
 * const tpm = await RingClient.connect('/run/vtpm-manager/vtpms/web1/ring.sock');
 * const answer = await tpm.transmit(Buffer.from('80010000000c0000017b0008', 'hex'), { deadline: 1000 });
 * await tpm.close();
 */
export class RingClient implements TpmChannel {
  readonly canCancel = true;
  readonly #device: RingDevice;
  readonly #port: RingPort;
  readonly #spinMs: number;
  readonly #queue: TransmitQueue;

  /** @throws FrontendError `unreachable`, `refused`, `closed`, `usage` */
  static async connect(target: string | RingOptions): Promise<RingClient> {
    const options = typeof target === 'string' ? { path: target } : target;
    const device = await RingDevice.connect(options);
    try {
      return new RingClient(device, await device.open(options), options.waits ?? 'adaptive');
    } catch (error) {
      await device.close();
      throw error;
    }
  }

  private constructor(device: RingDevice, port: RingPort, waits: keyof typeof SPIN_MS) {
    this.#device = device;
    this.#port = port;
    this.#spinMs = canSpin ? SPIN_MS[waits] : 0;
    this.#queue = new TransmitQueue({
      room: port.room,
      send: (command, locality) => {
        port.submit(command, locality);
        if (port.spin(performance.now() + this.#spinMs)) this.#takeAnswer();
      },
      giveUp: () => {
        port.cancel();
        return true;
      },
    });
    port.onNote = () => {
      if (this.#queue.isWaiting && port.isDone) this.#takeAnswer();
    };
    port.onEnd = () => this.#broke('the vTPM closed the ring');
    void device.ended.then(({ message }) => this.#broke(message));
  }

  get ended(): Promise<FrontendError> {
    return this.#queue.ended;
  }

  async transmit(command: Uint8Array, options: TransmitOptions = {}): Promise<Buffer> {
    const { locality = 0 } = options;
    if (!Number.isInteger(locality) || locality < 0 || locality > 255) {
      throw new FrontendError('locality', 'a locality is a number from 0 to 255');
    }
    return await this.#queue.transmit(command, options);
  }

  async close(): Promise<void> {
    this.#queue.end(new FrontendError('closed', 'the ring was closed on this side'));
    this.#port.close();
    await this.#device.close();
  }

  #takeAnswer(): void {
    try {
      const answer = this.#port.takeAnswer();
      if (answer) this.#queue.answered(answer);
      else this.#queue.notRun();
    } catch (error) {
      this.#queue.end(error as FrontendError);
      void this.close();
    }
  }

  #broke(why: string): void {
    // The answer may have come before the end.
    if (this.#queue.isWaiting && this.#port.isDone) this.#takeAnswer();
    const reason = new FrontendError('closed', why);
    this.#queue.end(reason, this.#port.isTaken ? lost(why) : reason);
    void this.close();
  }
}
