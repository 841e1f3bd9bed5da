import type { Socket } from 'node:net';

/** A client of a raw TPM stream, for bytes that a proper client would not send. */
export class TpmClient {
  readonly socket: Socket;
  /** Bytes of answers that nobody asked for yet. */
  received: Buffer = Buffer.alloc(0);
  isEnded = false;
  readonly ended: Promise<void>;
  readonly #waiters: {
    bytes: number | 'response';
    resolve: (bytes: Buffer) => void;
    reject: (e: Error) => void;
  }[] = [];

  constructor(socket: Socket) {
    this.socket = socket;
    socket.on('data', (chunk: Buffer) => {
      this.received = Buffer.concat([this.received, chunk]);
      this.#serve();
    });
    this.ended = new Promise((resolve) => {
      const end = (): void => {
        this.isEnded = true;
        for (const waiter of this.#waiters.splice(0)) waiter.reject(new Error('the connection ended'));
        resolve();
      };
      socket.on('end', end);
      socket.on('close', end);
      socket.on('error', end);
    });
  }

  send(bytes: Uint8Array | string): void {
    this.socket.write(typeof bytes === 'string' ? Buffer.from(bytes, 'hex') : bytes);
  }

  /** The next whole TPM response. */
  response(): Promise<Buffer> {
    return this.#take('response');
  }

  bytes(count: number): Promise<Buffer> {
    return this.#take(count);
  }

  async transmit(command: Uint8Array | string): Promise<Buffer> {
    this.send(command);
    return this.response();
  }

  close(): void {
    this.socket.destroy();
  }

  #take(bytes: number | 'response'): Promise<Buffer> {
    return new Promise((resolve, reject) => {
      this.#waiters.push({ bytes, resolve, reject });
      this.#serve();
      if (this.isEnded && this.#waiters.length > 0) {
        for (const waiter of this.#waiters.splice(0)) waiter.reject(new Error('the connection ended'));
      }
    });
  }

  #serve(): void {
    for (let waiter = this.#waiters[0]; waiter; waiter = this.#waiters[0]) {
      const wanted =
        waiter.bytes !== 'response'
          ? waiter.bytes
          : this.received.length >= 10
            ? this.received.readUInt32BE(2)
            : Number.POSITIVE_INFINITY;
      if (this.received.length < wanted) return;
      this.#waiters.shift();
      waiter.resolve(this.received.subarray(0, wanted));
      this.received = this.received.subarray(wanted);
    }
  }
}
