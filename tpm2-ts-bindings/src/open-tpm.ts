import { stat } from 'node:fs/promises';
import { createTpm, type Tpm } from './tpm.js';
import { openDevice } from './transport/device.js';
import { openSocket, openTcp } from './transport/socket.js';
import { openSwtpm, type SwtpmEndpoints } from './transport/swtpm.js';
import type { Transport } from './transport/transport.js';

/**
 * Where a TPM is: the path of a character device or unix socket, a TCP address, or both channels of a swtpm. With the
 * control channel, a signal can stop a command (`RunOptions.signal`).
 */
export type TpmAddress = string | { readonly host: string; readonly port: number } | SwtpmEndpoints;

/**
 * The TPM at an address, with the transport's own deadlines: `createTpm(await openSocket(path, options))` sets others.
 * @throws TpmError `transport` where it cannot be opened
 */
export async function openTpm(address: TpmAddress): Promise<Tpm> {
  return createTpm(await openTransport(address));
}

async function openTransport(address: TpmAddress): Promise<Transport> {
  if (typeof address !== 'string') return 'data' in address ? openSwtpm(address) : openTcp(address);
  const isSocket = await stat(address).then(
    (found) => found.isSocket(),
    () => false,
  );
  return isSocket ? openSocket(address) : openDevice(address);
}
