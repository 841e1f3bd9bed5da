import { once } from 'node:events';
import { rmSync } from 'node:fs';
import { createServer, type Server, type Socket } from 'node:net';
import type { TpmChannel } from './channel.js';
import { FrontendError } from './error.js';
import { MessageAssembler } from './framing.js';
import { answerControl } from './swtpm-control.js';

/** Sockets of this user alone. */
const UMASK = 0o177;

/**
 * A pair of sockets as tpm2-tss's swtpm TCTI expects them, in front of a vTPM: commands at `path`, control requests at
 * `path`.ctrl. Clients take turns, command by command. As with swtpm itself, what one of them leaves loaded stays.
 */
export class SwtpmSockets {
  readonly #servers: Server[] = [];
  readonly #clients = new Set<Socket>();
  readonly #channel: TpmChannel;
  readonly #path: string;
  /** In the order in which they run. */
  readonly #running = new Set<AbortController>();

  /** @throws FrontendError `usage` where the sockets cannot be made */
  static async open(channel: TpmChannel, path: string): Promise<SwtpmSockets> {
    const sockets = new SwtpmSockets(channel, path);
    try {
      await sockets.#listen(path, (client) => void sockets.#serve(client));
      await sockets.#listen(`${path}.ctrl`, (client) => sockets.#control(client));
      return sockets;
    } catch (cause) {
      await sockets.close();
      throw new FrontendError('usage', `${path} cannot be made: ${(cause as Error).message}`, cause);
    }
  }

  private constructor(channel: TpmChannel, path: string) {
    this.#channel = channel;
    this.#path = path;
  }

  /** The vTPM's channel stays open. */
  async close(): Promise<void> {
    for (const client of this.#clients) client.destroy();
    for (const server of this.#servers.splice(0)) {
      server.close();
      await once(server, 'close');
    }
    for (const path of [this.#path, `${this.#path}.ctrl`]) rmSync(path, { force: true });
  }

  async #listen(path: string, onClient: (client: Socket) => void): Promise<void> {
    const server = createServer((client) => {
      this.#clients.add(client);
      client.on('error', () => {});
      client.on('close', () => this.#clients.delete(client));
      onClient(client);
    });
    const before = process.umask(UMASK);
    try {
      server.listen(path);
    } finally {
      process.umask(before);
    }
    await once(server, 'listening');
    this.#servers.push(server);
  }

  /** What cannot be answered ends the client's connection: its TSS says so, and nothing is run twice. */
  async #serve(client: Socket): Promise<void> {
    const assembler = new MessageAssembler();
    try {
      for await (const chunk of client) {
        for (const command of assembler.push(chunk as Buffer)) {
          client.write(await this.#transmit(command));
        }
      }
    } catch {
      client.destroy();
    }
  }

  async #transmit(command: Buffer): Promise<Buffer> {
    const running = new AbortController();
    this.#running.add(running);
    try {
      return await this.#channel.transmit(command, { signal: running.signal });
    } finally {
      this.#running.delete(running);
    }
  }

  #cancel(): void {
    for (const first of this.#running) {
      first.abort();
      return;
    }
  }

  #control(client: Socket): void {
    client.on('data', (request) => {
      const answer = answerControl(request, {
        setLocality: (locality) => locality === 0,
        cancel: this.#channel.canCancel ? () => this.#cancel() : undefined,
      });
      if (!client.write(answer)) client.pause();
    });
    client.on('drain', () => client.resume());
  }
}
