import { writeFileSync } from 'node:fs';
import { StreamTransport } from 'tpm2-ts-bindings/internal/transport/stream';

/**
 * For `mocha --require`: notes which commands the tests of that run sent over a socket and what came back, below all
 * that tests put between client and TPM. Written to the file that CENSUS names: command code and response code of each.
 */

const seen = new Set<string>();
const transmit = StreamTransport.prototype.transmit;
StreamTransport.prototype.transmit = async function (command: Uint8Array): Promise<Buffer> {
  const code = Buffer.from(command).readUInt32BE(6);
  const answer = await transmit.call(this, command);
  seen.add(`${code} ${answer.readUInt32BE(6)}`);
  return answer;
};

export const mochaHooks = {
  afterAll(): void {
    const path = process.env.CENSUS;
    if (path === undefined) throw new Error('CENSUS names no file');
    writeFileSync(path, JSON.stringify([...seen].map((pair) => pair.split(' ').map(Number))));
  },
};
