import { closeSync } from 'node:fs';
import { Socket } from 'node:net';
import { sendDescriptor, socketFd, socketPair } from 'vtpm-common/libc';
import { TpmClient } from './tpm-client.js';

/** swtpm's control commands, with the bytes of their answers. */
export const CMD = {
  GET_CAPABILITY: [0x01, 8],
  INIT: [0x02, 4],
  SHUTDOWN: [0x03, 4],
  GET_TPMESTABLISHED: [0x04, 8],
  SET_LOCALITY: [0x05, 4],
  HASH_START: [0x06, 4],
  HASH_DATA: [0x07, 4],
  HASH_END: [0x08, 4],
  CANCEL_TPM_CMD: [0x09, 4],
  STORE_VOLATILE: [0x0a, 4],
  RESET_TPMESTABLISHED: [0x0b, 4],
  GET_STATEBLOB: [0x0c, 16],
  SET_STATEBLOB: [0x0d, 4],
  STOP: [0x0e, 4],
  GET_CONFIG: [0x0f, 8],
  SET_DATAFD: [0x10, 4],
  SET_BUFFERSIZE: [0x11, 16],
  GET_INFO: [0x12, 12],
  LOCK_STORAGE: [0x13, 4],
} as const satisfies Record<string, readonly [code: number, answer: number]>;

export type ControlCommand = keyof typeof CMD;

export function u32(...values: number[]): Buffer {
  const out = Buffer.alloc(4 * values.length);
  values.forEach((value, index) => {
    out.writeUInt32BE(value >>> 0, 4 * index);
  });
  return out;
}

export function request(command: ControlCommand, body: Uint8Array = Buffer.alloc(0)): Buffer {
  return Buffer.concat([u32(CMD[command][0]), body]);
}

/** A VMM's side of the control protocol, byte by byte. */
export class Vmm {
  readonly control: TpmClient;
  data: TpmClient | undefined;

  constructor(control: TpmClient) {
    this.control = control;
  }

  /** The whole answer, in hex. */
  async ask(command: ControlCommand, body?: Uint8Array): Promise<string> {
    return (await this.answer(command, body)).toString('hex');
  }

  async answer(command: ControlCommand, body?: Uint8Array): Promise<Buffer> {
    this.control.send(request(command, body));
    return this.control.bytes(CMD[command][1]);
  }

  /** The result. */
  async result(command: ControlCommand, body?: Uint8Array): Promise<number> {
    return (await this.answer(command, body)).readUInt32BE(0);
  }

  /** Gives one end of a new pair of sockets; the other one is `data` when the answer is success. */
  async setDataFd(): Promise<number> {
    const { result, fd } = await this.giveDataFd();
    if (result === 0) this.data = new TpmClient(new Socket({ fd, allowHalfOpen: true }));
    else closeSync(fd);
    return result;
  }

  /** The same; what is done with this end is up to the caller. */
  async giveDataFd(): Promise<{ readonly result: number; readonly fd: number }> {
    const [fd, there] = socketPair();
    sendDescriptor(socketFd(this.control.socket), there, request('SET_DATAFD'));
    closeSync(there);
    return { result: (await this.control.bytes(4)).readUInt32BE(0), fd };
  }

  /** As any request, with a descriptor that nobody asked for. */
  async askWithStray(command: ControlCommand, body?: Uint8Array): Promise<string> {
    const [here, there] = socketPair();
    sendDescriptor(socketFd(this.control.socket), there, request(command, body));
    closeSync(here);
    closeSync(there);
    return (await this.control.bytes(CMD[command][1])).toString('hex');
  }

  /** What QEMU does when its VM starts: the data channel, buffer size and INIT. */
  async powerOn(bufferSize = 4096): Promise<number> {
    if (!this.data) await this.setDataFd();
    await this.answer('STOP');
    await this.answer('SET_BUFFERSIZE', u32(bufferSize));
    return this.result('INIT', u32(0));
  }

  /** A state blob, or its result where there is none. */
  async getBlob(type: number): Promise<Buffer | number> {
    const head = await this.answer('GET_STATEBLOB', u32(1, type, 0));
    const result = head.readUInt32BE(0);
    return result === 0 ? this.control.bytes(head.readUInt32BE(12)) : result;
  }

  async setBlob(type: number, blob: Buffer): Promise<number> {
    // As QEMU: the header, then the content.
    this.control.send(Buffer.concat([request('SET_STATEBLOB', u32(0, type, blob.length))]));
    this.control.send(blob);
    return (await this.control.bytes(4)).readUInt32BE(0);
  }

  close(): void {
    this.control.close();
    this.data?.close();
  }
}
