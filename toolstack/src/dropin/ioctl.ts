import { connect, type NetConnectOpts } from 'node:net';
import { type OptionSpec, parseArguments } from './arguments.js';
import { DropinRefusal } from './refusal.js';

/** One request of swtpm's control protocol, big-endian, and how its answer is shown. */
interface Verb {
  readonly name: string;
  /** The command's number, and its body given the option's value. */
  request(value: string): Buffer;
  /** Bytes of the answer of one that succeeds, the result included; undefined: until it says how long it is. */
  readonly answerBytes: number | undefined;
  /** What is written to standard output. @param answer without the result */
  show?(answer: Buffer): string;
}

const bare = (command: number): Buffer => words(command);
const word = (command: number, value: string, most: number): Buffer => words(command, number(value, most));
/** SET_LOCALITY and RESET_TPMESTABLISHED take one byte. */
const byte = (command: number, value: string): Buffer =>
  Buffer.concat([words(command), Buffer.from([number(value, 4)])]);

const VERBS: Readonly<Record<string, Verb>> = {
  c: {
    name: 'PTM_GET_CAPABILITY',
    request: () => bare(0x01),
    answerBytes: 8,
    show: (answer) => `ptm capability is 0x${answer.readUInt32BE(0).toString(16)}`,
  },
  // Volatile state that is there goes into the TPM and is deleted, as swtpm_ioctl has it.
  i: { name: 'PTM_INIT', request: () => words(0x02, 1), answerBytes: 4 },
  s: { name: 'PTM_SHUTDOWN', request: () => bare(0x03), answerBytes: 4 },
  e: {
    name: 'PTM_GET_TPMESTABLISHED',
    request: () => bare(0x04),
    answerBytes: 8,
    show: (answer) => `tpmEstablished is ${answer.readUInt8(0)}`,
  },
  l: { name: 'PTM_SET_LOCALITY', request: (value) => byte(0x05, value), answerBytes: 4 },
  C: { name: 'PTM_CANCEL_TPM_CMD', request: () => bare(0x09), answerBytes: 4 },
  v: { name: 'PTM_STORE_VOLATILE', request: () => bare(0x0a), answerBytes: 4 },
  r: { name: 'PTM_RESET_TPMESTABLISHED', request: (value) => byte(0x0b, value), answerBytes: 4 },
  stop: { name: 'PTM_STOP', request: () => bare(0x0e), answerBytes: 4 },
  g: {
    name: 'PTM_GET_CONFIG',
    request: () => bare(0x0f),
    answerBytes: 8,
    show: (answer) => `ptm configuration flags: 0x${answer.readUInt32BE(0).toString(16)}`,
  },
  b: {
    name: 'PTM_SET_BUFFERSIZE',
    request: (value) => word(0x11, value, 0xffff_ffff),
    answerBytes: 16,
    show: (answer) =>
      `TPM buffersize: ${answer.readUInt32BE(0)}\nminimum size  : ${answer.readUInt32BE(4)}\nmaximum size  : ${answer.readUInt32BE(8)}`,
  },
  info: {
    name: 'PTM_GET_INFO',
    // 64 bits of flags, offset, padding.
    request: (value) => words(0x12, 0, number(value, 0xffff_ffff), 0, 0),
    answerBytes: undefined,
    show: (answer) => answer.toString('utf8', 8).replace(/\0+$/, ''),
  },
  'lock-storage': {
    name: 'PTM_LOCK_STORAGE',
    request: (value) => word(0x13, value, 0xffff_ffff),
    answerBytes: 4,
  },
};

const TAKES_VALUE = ['l', 'r', 'b', 'info', 'lock-storage', 'unix', 'tcp'];
const ELSEWHERE =
  'this small client does not do that; install swtpm-tools and call its swtpm_ioctl, which vTPMs serve as well';

const SPECS: Readonly<Record<string, OptionSpec>> = {
  ...Object.fromEntries(
    [...Object.keys(VERBS), 'unix', 'tcp'].map((name) => [
      name,
      { takes: TAKES_VALUE.includes(name) ? 'value' : 'nothing' } as const,
    ]),
  ),
  save: { takes: 'nothing', refused: ELSEWHERE },
  load: { takes: 'nothing', refused: ELSEWHERE },
  h: { takes: 'nothing', refused: ELSEWHERE },
  'tpm-device': { takes: 'nothing', refused: ELSEWHERE },
};
const LETTERS = Object.fromEntries([...'cisevrClgbh'].map((letter) => [letter, letter]));

/** As swtpm_ioctl has it. */
const DEFAULT_PORT = 6545;
const LIMIT_MS = 60_000;

/** `swtpm_ioctl`: one request to a control socket. @returns what goes to standard output @throws DropinRefusal */
export async function runIoctl(args: readonly string[]): Promise<string> {
  const { options } = parseArguments(args, SPECS, LETTERS);
  const asked = Object.keys(VERBS).filter((name) => options.has(name));
  const [name = ''] = asked;
  const verb = VERBS[name];
  if (!verb || asked.length > 1) throw new DropinRefusal('name one command; --help shows them');
  const answer = await exchange(endpoint(options), verb, options.get(name)?.at(-1) ?? '');
  return verb.show === undefined ? '' : `${verb.show(answer)}\n`;
}

function endpoint(options: ReadonlyMap<string, readonly string[]>): NetConnectOpts {
  const path = options.get('unix')?.at(-1);
  if (path !== undefined) return { path };
  const address = options.get('tcp')?.at(-1);
  if (address === undefined)
    throw new DropinRefusal('name the control socket with --unix PATH or --tcp [HOST]:PORT');
  const [, host = '', port = ''] = /^(.*?)(?::(\d*))?$/.exec(address) ?? [];
  return { host: host === '' ? '127.0.0.1' : host, port: port === '' ? DEFAULT_PORT : number(port, 0xffff) };
}

function exchange(to: NetConnectOpts, verb: Verb, value: string): Promise<Buffer> {
  const request = verb.request(value);
  return new Promise((resolve, reject) => {
    const socket = connect(to, () => socket.write(request));
    let received = Buffer.alloc(0);
    const fail = (why: string): void => {
      socket.destroy();
      reject(new DropinRefusal(`Could not execute ${verb.name}: ${why}`));
    };
    socket.setTimeout(LIMIT_MS, () => fail(`no answer within ${LIMIT_MS / 1000} s`));
    socket.on('error', (error: NodeJS.ErrnoException) => fail(error.code ?? error.message));
    socket.on('close', () => fail('the connection was closed'));
    socket.on('data', (chunk: Buffer) => {
      received = Buffer.concat([received, chunk]);
      if (received.length < 4) return;
      const result = received.readUInt32BE(0);
      if (result !== 0) {
        socket.destroy();
        reject(new DropinRefusal(`TPM result from ${verb.name}: 0x${result.toString(16)}`));
      } else if (received.length >= bytesOf(verb, received)) {
        socket.destroy();
        resolve(received.subarray(4));
      }
    });
  });
}

/** GET_INFO: result, total length, length of this part, the part. */
function bytesOf({ answerBytes }: Verb, received: Buffer): number {
  if (answerBytes !== undefined) return answerBytes;
  return received.length < 12 ? 12 : 12 + received.readUInt32BE(8);
}

function words(...values: readonly number[]): Buffer {
  const out = Buffer.alloc(4 * values.length);
  for (const [index, value] of values.entries()) out.writeUInt32BE(value, 4 * index);
  return out;
}

function number(text: string, most: number): number {
  const value = /^(0x[0-9a-f]{1,8}|\d{1,10})$/i.test(text) ? Number(text) : Number.NaN;
  if (value <= most) return value;
  throw new DropinRefusal(`"${text}" is no number from 0 to ${most}`);
}
