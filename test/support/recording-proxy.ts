import { createHash } from 'node:crypto';
import { mkdtempSync, rmSync } from 'node:fs';
import { connect, createServer, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { NV_ReadPublic } from 'tpm2-ts-bindings';

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

/** Lies about an NV index: what its TPM2_NV_ReadPublic gives goes through `lie`. */
export function aboutIndex(handle: number, lie: (answer: Buffer) => Buffer): Interposer {
  return {
    response: (message, command) => {
      const isAsked = commandCode(command) === NV_ReadPublic.code && command.readUInt32BE(10) === handle;
      const isGiven = message.readUInt32BE(6) === 0;
      return isAsked && isGiven ? lie(message) : message;
    },
  };
}

/** TPM_RC_HANDLE, of the first handle: nothing is there. */
export const denied = () => Buffer.from('80010000000a0000018b', 'hex');

/** Another index is there: one bit of the attributes changed, and the Name that goes with them. */
export function disguised(answer: Buffer): Buffer {
  const size = answer.readUInt16BE(10);
  const nvPublic = answer.subarray(12, 12 + size);
  nvPublic.writeUInt8(nvPublic.readUInt8(9) ^ 4, 9);
  createHash('sha256')
    .update(nvPublic)
    .digest()
    .copy(answer, 12 + size + 4);
  return answer;
}

/** Command code of a command message. */
export function commandCode(command: Buffer): number {
  return command.readUInt32BE(6);
}
