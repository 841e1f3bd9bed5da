import { type OptionSpec, type ParsedArguments, parseArguments } from './arguments.js';
import { type OptionValue, type PartKind, parseOptionValue } from './option-value.js';
import { DropinRefusal } from './refusal.js';
import { parseStatePlace, type StatePlace } from './state-place.js';

/** Where clients come from: a listening or a connected socket. */
export type Entrance =
  | {
      readonly kind: 'path';
      readonly path: string;
      readonly mode: number;
      readonly uid: number | undefined;
      readonly gid: number | undefined;
    }
  | { readonly kind: 'port'; readonly host: string; readonly port: number }
  /** Inherited from the caller; `isConnected`: it is a client already. */
  | { readonly kind: 'descriptor'; readonly fd: number; readonly isConnected: boolean };

/** A file by its path, or a descriptor that the caller passed on. */
export type Destination = { readonly path: string } | { readonly fd: number };

/** What `swtpm socket` was asked for. */
export interface SwtpmOptions {
  readonly state: StatePlace;
  readonly server: (Entrance & { readonly disconnects: boolean }) | undefined;
  readonly control: Entrance | undefined;
  /** Powered on without a CMD_INIT. */
  readonly isOnAtOnce: boolean;
  /** TPM2_Startup(CLEAR) is sent before anybody is served. */
  readonly isStartedUp: boolean;
  readonly isIncoming: boolean;
  readonly terminates: boolean;
  readonly isDaemon: boolean;
  readonly pid: Destination | undefined;
  readonly log: (Destination & { readonly truncates: boolean; readonly prefix: string }) | undefined;
  readonly runAs: string | undefined;
}

const FILE_KEY =
  "the vTPM manager encrypts every vTPM's state under the host's TPM, with no key from a file; leave this option out (in libvirt: the <encryption> element)";

const SPECS: Readonly<Record<string, OptionSpec>> = {
  port: { takes: 'value' },
  fd: { takes: 'value' },
  terminate: { takes: 'nothing' },
  daemon: { takes: 'nothing' },
  ctrl: { takes: 'value' },
  server: { takes: 'value' },
  log: { takes: 'value' },
  locality: { takes: 'value' },
  pid: { takes: 'value' },
  tpmstate: { takes: 'value' },
  flags: { takes: 'value' },
  runas: { takes: 'value' },
  tpm2: { takes: 'nothing' },
  seccomp: { takes: 'value' },
  migration: { takes: 'value' },
  key: { takes: 'value', refused: FILE_KEY },
  'migration-key': { takes: 'value', refused: FILE_KEY },
  chroot: { takes: 'value', refused: 'workers have no file system at all; leave this option out' },
  profile: {
    takes: 'value',
    refused: 'every vTPM has the profile of the libtpms of this host; leave this option out',
  },
  pcap: { takes: 'value', refused: 'nobody records commands of a vTPM; leave this option out' },
  'print-states': { takes: 'nothing', refused: 'the manager keeps the states; ask vtpmctl list' },
  'print-profiles': {
    takes: 'nothing',
    refused: 'there are none; ask vtpmctl --version for that of libtpms',
  },
  'print-info': { takes: 'value', refused: 'ask a running vTPM: swtpm_ioctl --info' },
};

const SHORT = { p: 'port', f: 'fd', t: 'terminate', d: 'daemon', r: 'runas', R: 'chroot' } as const;

const ADDRESS = { type: 'text', path: 'text', port: 'number', bindaddr: 'text', ifname: 'text' } as const;
const OWNER = { mode: 'mode', uid: 'number', gid: 'number' } as const;
const SERVER = { ...ADDRESS, ...OWNER, fd: 'number', disconnect: 'switch' } as const;
const CONTROL = { ...ADDRESS, ...OWNER, fd: 'number', clientfd: 'number', terminate: 'switch' } as const;
const LOG = { file: 'text', fd: 'number', level: 'number', prefix: 'text', truncate: 'switch' } as const;
const FLAGS = {
  'not-need-init': 'flag',
  'startup-clear': 'flag',
  'startup-state': 'flag',
  'startup-deactivated': 'flag',
  'startup-none': 'flag',
  'disable-auto-shutdown': 'flag',
} as const;

/** As swtpm's own sockets have it. */
const SOCKET_MODE = 0o770;

/**
 * Reads the arguments of `swtpm socket`, without `socket` itself.
 * @throws DropinRefusal for what is wrong, and for what a vTPM of the manager cannot have
 */
export function parseSwtpmArguments(args: readonly string[], env: NodeJS.ProcessEnv = {}): SwtpmOptions {
  const parsed = parseArguments(args, SPECS, SHORT);
  const [operand] = parsed.operands;
  if (operand !== undefined)
    throw new DropinRefusal(`"${operand}" is no option; --help names those that are`);
  const has = (name: string): boolean => parsed.options.has(name);
  if (!has('tpm2')) {
    throw new DropinRefusal(
      'TPM 1.2, swtpm\'s default, is not made any more; add --tpm2 (in libvirt: <backend type="emulator" version="2.0"/>)',
    );
  }
  const control = parseControl(parsed);
  const server = parseServer(parsed);
  if (!control && !server) {
    throw new DropinRefusal(
      'nobody could reach this TPM; add --ctrl type=unixio,path=PATH, or --server as well',
    );
  }
  checkLocality(parsed);
  checkSeccomp(parsed);
  const flags = value(parsed, 'flags', FLAGS);
  const migration = value(parsed, 'migration', {
    incoming: 'flag',
    'release-lock-outgoing': 'flag',
  });
  return {
    state: parseStatePlace('--tpmstate', last(parsed, 'tpmstate') ?? fromEnvironment(env)),
    server,
    control: control?.entrance,
    ...startOf(flags),
    isIncoming: migration?.incoming === true,
    terminates: has('terminate') || control?.terminates === true,
    isDaemon: has('daemon'),
    pid: destination('--pid', value(parsed, 'pid', { file: 'text', fd: 'number', mode: 'mode' })),
    log: parseLog(parsed),
    runAs: last(parsed, 'runas'),
  };
}

function last({ options }: ParsedArguments, name: string): string | undefined {
  return options.get(name)?.at(-1);
}

function value<const S extends Readonly<Record<string, PartKind>>>(
  parsed: ParsedArguments,
  name: string,
  parts: S,
): OptionValue<S> | undefined {
  const text = last(parsed, name);
  return text === undefined ? undefined : parseOptionValue(`--${name}`, text, parts);
}

function fromEnvironment({ TPM_PATH: directory }: NodeJS.ProcessEnv): string | undefined {
  return directory === undefined || directory === '' ? undefined : `dir=${directory}`;
}

function startOf(
  flags: OptionValue<typeof FLAGS> | undefined,
): Pick<SwtpmOptions, 'isOnAtOnce' | 'isStartedUp'> {
  if (flags?.['startup-deactivated']) {
    throw new DropinRefusal('--flags startup-deactivated is of TPM 1.2; leave it out');
  }
  if (flags?.['startup-state']) {
    throw new DropinRefusal(
      '--flags startup-state finds nothing: no volatile state outlives the power-off of a vTPM; write startup-clear',
    );
  }
  const startups = (['clear', 'none'] as const).filter((kind) => flags?.[`startup-${kind}`]);
  if (startups.length > 1) {
    throw new DropinRefusal(`--flags has startup-${startups.join(' and startup-')}; name one`);
  }
  return {
    isStartedUp: startups.includes('clear'),
    isOnAtOnce: flags?.['not-need-init'] === true || startups.length > 0,
  };
}

function parseControl(
  parsed: ParsedArguments,
): { readonly entrance: Entrance; readonly terminates: boolean } | undefined {
  const given = value(parsed, 'ctrl', CONTROL);
  if (!given) return undefined;
  const { clientfd, terminate } = given;
  if (clientfd !== undefined && given.fd !== undefined) {
    throw new DropinRefusal('--ctrl has fd, a socket that listens, and clientfd, a client; name one of them');
  }
  if (clientfd !== undefined && given.type !== 'unixio') {
    throw new DropinRefusal('--ctrl clientfd is a unix socket; write type=unixio');
  }
  const entrance: Entrance =
    clientfd === undefined
      ? parseEntrance('--ctrl', given, false)
      : { kind: 'descriptor', fd: clientfd, isConnected: true };
  return { entrance, terminates: terminate === true };
}

function parseServer(parsed: ParsedArguments): SwtpmOptions['server'] {
  const given = value(parsed, 'server', SERVER);
  if (given) {
    const { disconnect } = given;
    // Unlike that of --ctrl, the descriptor of --server is a client.
    return { ...parseEntrance('--server', given, true), disconnects: disconnect === true };
  }
  const fd = last(parsed, 'fd');
  if (fd !== undefined) {
    const { fd: number = 0 } = parseOptionValue('--fd', `fd=${fd}`, { fd: 'number' });
    return { kind: 'descriptor', fd: number, isConnected: true, disconnects: false };
  }
  const port = last(parsed, 'port');
  if (port === undefined) return undefined;
  return {
    ...parseEntrance('--port', parseOptionValue('--port', `port=${port}`, SERVER), true),
    disconnects: true,
  };
}

function parseEntrance(
  option: string,
  given: OptionValue<Omit<typeof SERVER, 'disconnect'>>,
  isConnected: boolean,
): Entrance {
  const {
    type = 'tcp',
    fd,
    path,
    port,
    bindaddr = '127.0.0.1',
    ifname,
    mode = SOCKET_MODE,
    uid,
    gid,
  } = given;
  if (type !== 'unixio' && type !== 'tcp') {
    throw new DropinRefusal(
      `${option} type=${type} is not served; write type=unixio,path=PATH or type=tcp,port=PORT`,
    );
  }
  if (fd !== undefined) return { kind: 'descriptor', fd, isConnected };
  if (type === 'unixio') {
    if (path === undefined) throw new DropinRefusal(`${option} type=unixio needs path=PATH, or fd=NUMBER`);
    return { kind: 'path', path, mode, uid, gid };
  }
  if (port === undefined || port > 0xffff) {
    throw new DropinRefusal(`${option} type=tcp needs port=PORT, from 0 to 65535`);
  }
  if (ifname !== undefined) {
    throw new DropinRefusal(`${option}: ifname is not served; name the address itself with bindaddr`);
  }
  if (!/^(127(\.\d{1,3}){3}|::1|localhost)$/.test(bindaddr)) {
    throw new DropinRefusal(
      `${option}: a TPM is not offered to a network, and ${bindaddr} is not this host's own; write bindaddr=127.0.0.1`,
    );
  }
  return { kind: 'port', host: bindaddr, port };
}

function checkLocality(parsed: ParsedArguments): void {
  const given = value(parsed, 'locality', { 'reject-locality-4': 'flag', 'allow-set-locality': 'flag' });
  if (given?.['allow-set-locality']) {
    throw new DropinRefusal(
      '--locality allow-set-locality lets every client choose its locality; use the control channel, or vtpm-frontend proxy for /dev/vtpmx',
    );
  }
  if (given?.['reject-locality-4']) {
    throw new DropinRefusal(
      '--locality reject-locality-4 cannot be promised: who holds the control channel sets localities 0 to 4; leave it out',
    );
  }
}

/** Every worker has its own, stricter filter, and keeps it whatever is asked. */
function checkSeccomp(parsed: ParsedArguments): void {
  const given = value(parsed, 'seccomp', { action: 'text' });
  if (given && !['kill', 'log', 'none'].includes(given.action ?? '')) {
    throw new DropinRefusal('--seccomp is action=kill, action=log or action=none');
  }
}

function parseLog(parsed: ParsedArguments): SwtpmOptions['log'] {
  const given = value(parsed, 'log', LOG);
  const to = destination('--log', given);
  if (!given || !to || ('path' in to && to.path === '-')) return undefined;
  return { ...to, truncates: given.truncate === true, prefix: given.prefix ?? '' };
}

function destination(
  option: string,
  given: { readonly file?: string; readonly fd?: number } | undefined,
): Destination | undefined {
  if (!given) return undefined;
  const { file, fd } = given;
  if ((file === undefined) === (fd === undefined)) {
    throw new DropinRefusal(`${option} needs file=PATH or fd=NUMBER, and one of them`);
  }
  return file === undefined ? { fd: fd ?? 0 } : { path: file };
}
