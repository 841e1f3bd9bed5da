import { createHash, randomBytes } from 'node:crypto';
import { getRandom, nvDefineCounter, nvIncrement, pcrExtend, pcrRead } from '../support/tpm-commands.js';
import type { BlockingClient } from './blocking-client.js';

/** A measured command, and what the TPM has to be given first. Part 3 of the TPM 2.0 library has the layouts. */
export interface Measured {
  readonly name: string;
  /** Round trips in one round. */
  readonly count: number;
  prepare(client: BlockingClient): Buffer;
}

const PASSWORD = '00000009 40000009 0000 00 0000';
const OWNER = '40000001';
const SHA256 = '000b';
const NO_TICKET = '8024 40000007 0000';
// TPMA_OBJECT: fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, noDA, sign; restricted for a quoting key.
const SIGNING = '00040472';
const ATTESTING = '00050472';
const ECDSA_P256 = `0010 0018 ${SHA256} 0003 0010 0000 0000`;
const RSASSA_2048 = `0010 0014 ${SHA256} 0800 00000000 0000`;
const COUNTER_INDEX = 0x01500020;

function command(code: string, body: string): Buffer {
  const rest = Buffer.from(body.replaceAll(' ', ''), 'hex');
  const out = Buffer.alloc(10 + rest.length);
  out.writeUInt16BE(0x8002, 0);
  out.writeUInt32BE(out.length, 2);
  out.write(code, 6, 'hex');
  out.set(rest, 10);
  return out;
}

function createPrimary(type: string, attributes: string, parameters: string): Buffer {
  const area = `${type} ${SHA256} ${attributes} 0000 ${parameters}`.replaceAll(' ', '');
  const size = (area.length / 2).toString(16).padStart(4, '0');
  return command('00000131', `${OWNER} ${PASSWORD} 0004 0000 0000 ${size} ${area} 0000 00000000`);
}

/** @returns the handle in hexadecimal */
function makeKey(client: BlockingClient, bytes: Buffer): string {
  return client.succeed(bytes).toString('hex', 10, 14);
}

function sign(key: string): Buffer {
  const digest = createHash('sha256').update('what is signed').digest('hex');
  return command('0000015d', `${key} ${PASSWORD} 0020 ${digest} 0010 ${NO_TICKET}`);
}

function quote(key: string): Buffer {
  const nonce = randomBytes(16).toString('hex');
  return command('00000158', `${key} ${PASSWORD} 0010 ${nonce} 0010 00000001 ${SHA256} 03 ff0000`);
}

export const COMMANDS: readonly Measured[] = [
  { name: 'GetRandom', count: 1500, prepare: () => getRandom(16) },
  { name: 'PCR_Read', count: 1500, prepare: () => pcrRead(7) },
  { name: 'PCR_Extend', count: 1500, prepare: () => pcrExtend(16, Buffer.alloc(32, 7)) },
  {
    name: 'ECDSA P-256 sign',
    count: 300,
    prepare: (client) => sign(makeKey(client, createPrimary('0023', SIGNING, ECDSA_P256))),
  },
  {
    name: 'RSA-2048 sign',
    count: 60,
    prepare: (client) => sign(makeKey(client, createPrimary('0001', SIGNING, RSASSA_2048))),
  },
  {
    name: 'Quote (ECDSA P-256)',
    count: 300,
    prepare: (client) => quote(makeKey(client, createPrimary('0023', ATTESTING, ECDSA_P256))),
  },
];

export const NV_INCREMENT: Measured = {
  name: 'NV_Increment',
  count: 100,
  prepare: (client) => {
    client.succeed(nvDefineCounter(COUNTER_INDEX));
    return nvIncrement(COUNTER_INDEX);
  },
};
