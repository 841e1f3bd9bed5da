import { mkdtempSync, rmSync } from 'node:fs';
import { connect, createServer, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

/** A bus between a TPM and its client: a unix socket that hands everything on and keeps every byte. */
export interface RecordingProxy {
  /** Connect here instead of to the TPM. */
  readonly path: string;
  /** Everything the client sent, one buffer per chunk. */
  readonly commands: Buffer[];
  /** Everything the TPM sent. */
  readonly responses: Buffer[];
  /** All bytes of one direction. */
  sent(): Buffer;
  received(): Buffer;
  /** True where `needle` was on the bus in either direction. */
  saw(needle: Uint8Array): boolean;
  forget(): void;
  /**
   * A command of somebody else on the same bus, between two of the client's that is connected. Neither it nor the answer is
   * recorded.
   */
  inject(command: Buffer): Promise<Buffer>;
  close(): Promise<void>;
}

/**
 * What an interposer does with whole messages: given one, the one to hand on, or undefined to end the connection. May keep
 * the same buffer.
 */
export interface Interposer {
  command?(message: Buffer): Buffer | undefined;
  response?(message: Buffer, command: Buffer): Buffer | undefined;
}

/** @param target the TPM's data socket, e.g. `Swtpm.socket`; connected to anew for each client */
export async function startRecordingProxy(
  target: string,
  interposer: Interposer = {},
): Promise<RecordingProxy> {
  const directory = mkdtempSync(join(tmpdir(), 'vtpm-bus-'));
  const path = join(directory, 'bus.sock');
  const commands: Buffer[] = [];
  const responses: Buffer[] = [];
  const open = new Set<Socket>();
  let bus: Socket | undefined;
  let injected: ((response: Buffer) => void) | undefined;

  const server = createServer((client) => {
    const tpm = connect({ path: target });
    bus = tpm;
    let last: Buffer = Buffer.alloc(0);
    for (const socket of [client, tpm]) {
      open.add(socket);
      socket.on('error', () => socket.destroy());
      socket.on('close', () => {
        open.delete(socket);
        client.destroy();
        tpm.destroy();
      });
    }
    eachMessage(client, (message) => {
      last = message;
      const handed = interposer.command ? interposer.command(message) : message;
      if (handed === undefined) return void client.destroy();
      commands.push(handed);
      tpm.write(handed);
    });
    eachMessage(tpm, (message) => {
      if (injected) {
        injected(message);
        injected = undefined;
        return;
      }
      responses.push(message);
      const handed = interposer.response ? interposer.response(Buffer.from(message), last) : message;
      if (handed === undefined) client.destroy();
      else client.write(handed);
    });
  });
  await new Promise<void>((resolve) => server.listen(path, resolve));

  return {
    path,
    commands,
    responses,
    sent: () => Buffer.concat(commands),
    received: () => Buffer.concat(responses),
    saw: (needle) =>
      [commands, responses].some((bytes) => Buffer.concat(bytes).includes(Buffer.from(needle))),
    forget() {
      commands.length = 0;
      responses.length = 0;
    },
    inject(command) {
      return new Promise((resolve) => {
        injected = resolve;
        bus?.write(command);
      });
    },
    async close() {
      for (const socket of open) socket.destroy();
      await new Promise<void>((resolve) => server.close(() => resolve()));
      rmSync(directory, { recursive: true, force: true });
    },
  };
}

/** Cuts a TPM byte stream at the sizes in its headers. */
function eachMessage(socket: Socket, take: (message: Buffer) => void): void {
  let rest: Buffer = Buffer.alloc(0);
  socket.on('data', (chunk: Buffer) => {
    rest = Buffer.concat([rest, chunk]);
    while (rest.length >= 6 && rest.length >= rest.readUInt32BE(2)) {
      const size = rest.readUInt32BE(2);
      take(Buffer.from(rest.subarray(0, size)));
      rest = rest.subarray(size);
    }
  });
}

/** Command code of a command message. */
export function commandCode(command: Buffer): number {
  return command.readUInt32BE(6);
}
