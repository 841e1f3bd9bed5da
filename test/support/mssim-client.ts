import { once } from 'node:events';
import { createConnection } from 'node:net';
import { transmitFramed } from './framed.js';
import { TpmClient } from './tpm-client.js';

/** A client of the TCG simulator's two ports, for requests that a proper client would not make, too. */
export class MssimClient {
  private constructor(
    readonly commands: TpmClient,
    readonly platform: TpmClient,
  ) {}

  static async connect(port: number): Promise<MssimClient> {
    const open = async (at: number): Promise<TpmClient> => {
      const socket = createConnection(at, '127.0.0.1');
      await once(socket, 'connect');
      return new TpmClient(socket);
    };
    return new MssimClient(await open(port), await open(port + 1));
  }

  transmit(command: Uint8Array, locality = 0): Promise<Buffer> {
    return transmitFramed(this.commands, command, locality);
  }

  /** @returns the u32 that ends the answer */
  async signal(code: number, body = ''): Promise<number> {
    return await ask(this.platform, code, body);
  }

  async request(code: number, body = ''): Promise<number> {
    return await ask(this.commands, code, body);
  }

  close(): void {
    this.commands.close();
    this.platform.close();
  }
}

async function ask(client: TpmClient, code: number, body: string): Promise<number> {
  client.send(`${code.toString(16).padStart(8, '0')}${body}`);
  return (await client.bytes(4)).readUInt32BE(0);
}
