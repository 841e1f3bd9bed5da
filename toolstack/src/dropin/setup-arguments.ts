import { type OptionSpec, type ParsedArguments, parseArguments } from './arguments.js';
import { DropinRefusal } from './refusal.js';
import { parseStateUri, type StatePlace } from './state-place.js';
import type { Destination } from './swtpm-arguments.js';

/** What `swtpm_setup` was asked for. */
export interface SetupOptions {
  readonly state: StatePlace;
  /** Of `--vmid NAME:UUID`: both, or what there is of them. */
  readonly vm: { readonly name: string | undefined; readonly uuid: string | undefined };
  readonly vmid: string | undefined;
  readonly log: Destination | undefined;
  readonly createsKeys: boolean;
  readonly createsEkCertificate: boolean;
  readonly createsPlatformCertificate: boolean;
  readonly locksNvram: boolean;
  readonly writesCertificatesTo: string | undefined;
  readonly ifExists: 'fail' | 'keep' | 'replace';
  readonly isReconfigured: boolean;
  /** `undefined`: those that the configuration file names. */
  readonly pcrBanks: PcrBanks | undefined;
  /** `undefined`: the user's, or else the host's. */
  readonly config: string | undefined;
  readonly runAs: string | undefined;
}

/** `all`: that libtpms has. */
export type PcrBanks = readonly PcrBank[] | 'all';
export type PcrBank = 'sha1' | 'sha256' | 'sha384' | 'sha512';
const BANKS: readonly PcrBank[] = ['sha1', 'sha256', 'sha384', 'sha512'];

const FILE_KEY =
  "the vTPM manager encrypts every vTPM's state under the host's TPM, with no key from a file; leave this option out (in libvirt: the <encryption> element)";
const TPM12 = 'is of TPM 1.2, which is not made any more; leave it out';

const nothing: OptionSpec = { takes: 'nothing' };
const text: OptionSpec = { takes: 'value' };

const SPECS: Readonly<Record<string, OptionSpec>> = {
  'tpm-state': text,
  tpmstate: text,
  tpm2: nothing,
  createek: nothing,
  'create-ek-cert': nothing,
  'create-platform-cert': nothing,
  'create-spk': { takes: 'nothing', refused: 'guests make their storage root key themselves; leave it out' },
  'lock-nvram': nothing,
  decryption: nothing,
  // An RSA and an ECC key are made, whatever is asked.
  ecc: nothing,
  'allow-signing': {
    takes: 'nothing',
    refused: 'such an endorsement key is no standard one, and certificates of it say less; leave it out',
  },
  'rsa-keysize': text,
  vmid: text,
  logfile: text,
  config: text,
  overwrite: nothing,
  'not-overwrite': nothing,
  reconfigure: nothing,
  'pcr-banks': text,
  'write-ek-cert-files': text,
  runas: text,
  display: nothing,
  // The programs that swtpm_setup would start.
  tpm: text,
  swtpm_ioctl: text,
  'tcsd-system-ps-file': text,
  keyfile: { takes: 'value', refused: FILE_KEY },
  'keyfile-fd': { takes: 'value', refused: FILE_KEY },
  pwdfile: { takes: 'value', refused: FILE_KEY },
  'pwdfile-fd': { takes: 'value', refused: FILE_KEY },
  cipher: { takes: 'value', refused: FILE_KEY },
  'take-ownership': { takes: 'nothing', refused: `it ${TPM12}` },
  ownerpass: { takes: 'value', refused: `it ${TPM12}` },
  'owner-well-known': { takes: 'nothing', refused: `it ${TPM12}` },
  srkpass: { takes: 'value', refused: `it ${TPM12}` },
  'srk-well-known': { takes: 'nothing', refused: `it ${TPM12}` },
  'create-config-files': {
    takes: 'value',
    refused:
      'the vTPM manager has no such files; for those of swtpm_localca run the swtpm_setup of swtpm-tools',
  },
  profile: {
    takes: 'value',
    refused: 'every vTPM has the profile of the libtpms of this host; leave it out',
  },
};

const UUID = /[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/i;

/** Reads the arguments of `swtpm_setup`. @throws DropinRefusal */
export function parseSetupArguments(args: readonly string[]): SetupOptions {
  const parsed = parseArguments(args, SPECS, {});
  const [operand] = parsed.operands;
  if (operand !== undefined)
    throw new DropinRefusal(`"${operand}" is no option; --help names those that are`);
  const has = (name: string): boolean => parsed.options.has(name);
  if (!has('tpm2')) {
    throw new DropinRefusal(
      'TPM 1.2, swtpm_setup\'s default, is not made any more; add --tpm2 (in libvirt: <backend type="emulator" version="2.0"/>)',
    );
  }
  const state = last(parsed, 'tpm-state') ?? last(parsed, 'tpmstate');
  if (state === undefined) {
    throw new DropinRefusal('--tpmstate is missing; name the directory of the vTPM with it');
  }
  const size = last(parsed, 'rsa-keysize') ?? '2048';
  if (size !== '2048') {
    throw new DropinRefusal(`--rsa-keysize ${size} is not made; the endorsement key has 2048 bits`);
  }
  const vmid = last(parsed, 'vmid');
  const logfile = last(parsed, 'logfile');
  const banks = last(parsed, 'pcr-banks');
  const createsPlatformCertificate = has('create-platform-cert');
  const createsEkCertificate = createsPlatformCertificate || has('create-ek-cert');
  return {
    state: parseStateUri('--tpmstate', state),
    vm: vmOf(vmid),
    vmid,
    log: logfile === undefined ? undefined : { path: logfile },
    createsKeys: createsEkCertificate || has('createek'),
    createsEkCertificate,
    createsPlatformCertificate,
    locksNvram: has('lock-nvram'),
    writesCertificatesTo: last(parsed, 'write-ek-cert-files'),
    ifExists: has('not-overwrite') ? 'keep' : has('overwrite') ? 'replace' : 'fail',
    isReconfigured: has('reconfigure'),
    pcrBanks: banks === undefined ? undefined : parseBanks('--pcr-banks', banks),
    config: last(parsed, 'config'),
    runAs: last(parsed, 'runas'),
  };
}

function last({ options }: ParsedArguments, name: string): string | undefined {
  return options.get(name)?.at(-1);
}

/** libvirt's is `NAME:UUID`; others say what they like. */
function vmOf(vmid: string | undefined): SetupOptions['vm'] {
  const uuid = vmid === undefined ? undefined : UUID.exec(vmid)?.[0].toLowerCase();
  const name = uuid === undefined ? vmid : vmid?.slice(0, -uuid.length).replace(/:$/, '');
  return { name: name === '' ? undefined : name, uuid };
}

/** `-` leaves them as they are: all. @param where it was written @throws DropinRefusal */
export function parseBanks(where: string, given: string): PcrBanks {
  if (given === '-') return 'all';
  const names = given.split(',');
  const unknown = names.find((name) => !BANKS.some((bank) => bank === name));
  if (unknown !== undefined) {
    throw new DropinRefusal(
      `${where} names the bank "${unknown}"; there are ${BANKS.join(', ')}, or - for all`,
    );
  }
  return BANKS.filter((bank) => names.includes(bank));
}
