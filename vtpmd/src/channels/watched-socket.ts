import { type ConnectOpts, Socket, type SocketConstructorOpts } from 'node:net';

/**
 * A socket that the event loop watches and never reads: it only says that there is something to read. libuv, given a buffer
 * of no length, calls back without reading (UV_ENOBUFS).
 */
export class WatchedSocket {
  readonly #socket: Socket;
  readonly #handle: ReadHandle;
  #isWatched = false;

  /** @param fd owned by this from now on */
  constructor(fd: number, onReadable: () => void) {
    const options: SocketConstructorOpts & ConnectOpts & { manualStart: boolean } = {
      fd,
      allowHalfOpen: true,
      manualStart: true,
      onread: { buffer: new Uint8Array(0), callback: () => false },
    };
    this.#socket = new Socket(options);
    this.#socket.on('error', () => {});
    this.#handle = (this.#socket as unknown as { _handle: ReadHandle })._handle;
    this.#handle.onread = onReadable;
  }

  /** Calls back again and again while there is something. */
  watch(): void {
    if (this.#isWatched || this.#socket.destroyed) return;
    this.#isWatched = true;
    this.#handle.readStart();
  }

  unwatch(): void {
    if (!this.#isWatched) return;
    this.#isWatched = false;
    if (!this.#socket.destroyed) this.#handle.readStop();
  }

  /** Closes the descriptor. */
  destroy(): void {
    this.#socket.destroy();
  }
}

/** What Node keeps under a net.Socket. */
interface ReadHandle {
  onread: () => void;
  readStart(): number;
  readStop(): number;
}
