import { once } from 'node:events';
import { createConnection } from 'node:net';
import type { Transport } from 'tpm2-ts-bindings';
import { TpmClient } from './tpm-client.js';

/** TPM2_SEND_COMMAND: u32 8, u8 locality, u32 length, command. */
export function frame(command: Uint8Array, locality = 0, length = command.length): Buffer {
  const head = Buffer.from('000000080000000000', 'hex');
  head.writeUInt8(locality, 4);
  head.writeUInt32BE(length, 5);
  return Buffer.concat([head, command]);
}

/** The response out of the next framed answer. */
export async function framedResponse(client: TpmClient): Promise<Buffer> {
  const response = await client.bytes((await client.bytes(4)).readUInt32BE(0));
  const trailer = (await client.bytes(4)).readUInt32BE(0);
  if (trailer !== 0) throw new Error(`the trailer is ${trailer}`);
  return response;
}

export async function transmitFramed(client: TpmClient, command: Uint8Array, locality = 0): Promise<Buffer> {
  client.send(frame(command, locality));
  return await framedResponse(client);
}

/** A client that sends some commands bare and others framed, on one connection. */
export async function openMixed(path: string): Promise<Transport> {
  const socket = createConnection(path);
  await once(socket, 'connect');
  const client = new TpmClient(socket);
  return {
    transmit: async (command) =>
      Buffer.from(
        Math.random() < 0.5 ? await client.transmit(command) : await transmitFramed(client, command),
      ),
    close: async () => client.close(),
  };
}
