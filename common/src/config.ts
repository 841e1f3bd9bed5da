import { readFileSync } from 'node:fs';
import { resolve } from 'node:path';
import { ConfigError } from './config-error.js';
import { defaultHome, defaultRun, type Paths, pathsOf } from './paths.js';

/** The settings of an installation. A flag wins over the environment, the environment over `config.json`. */
export interface Settings {
  home: string;
  'run-dir': string;
  'log-level': 'trace' | 'debug' | 'info' | 'warn' | 'error' | 'silent';
  /** `auto` is `pretty` on a terminal and `json` otherwise. */
  'log-format': 'auto' | 'pretty' | 'json';
  /** How a worker is confined when `create` does not say. */
  isolation: 'sandbox' | 'vm' | 'none';
  /** What runs a worker's VM; `auto` is `kvm` where the host has it. */
  'vm-accelerator': 'auto' | 'kvm' | 'tcg';
  /** Seconds after which a ticket that was not used is void. */
  'ticket-lifetime': number;
  /** Milliseconds that a worker has to stop cleanly before it is killed. */
  'worker-stop-timeout': number;
  /** Restarts of a vTPM's worker in one run of its VM that may come at once. */
  'restart-burst': number;
  /** Milliseconds that a command is held, while the manager is away, before it is tried. */
  'outage-hold': number;
  /** Workers that wait for a start, at least. */
  'pool-min': number;
  /** Workers that wait for a start, at most; 0 keeps none. */
  'pool-max': number;
  /** MiB of the host's memory that must stay available beside the workers that wait. */
  'pool-memory-reserve': number;
  /** Whether volatile state is check-pointed before each answer, or a crash of a worker ends the VM's run. */
  checkpoint: 'always' | 'off';
  /** MiB of the store's file system that only saves may use. */
  'store-reserve': number;
  /** Seconds until the root TPM counts saves: how much an old disk can hide after an unclean stop. */
  'anchor-window': number;
  /** Seconds that a start waits for peers to say whether they rescued vTPMs from here; 0 does not ask. */
  'ask-peers-at-start': number;
  /** Hours from a retirement to the rotation that makes its state unreadable on old disks too; 0 leaves it to the operator. */
  'erase-after': number;
  /** Where other hosts are listened for, `HOST:PORT` with commas between them; nowhere where empty. */
  'peer-listen': string;
  /** Seconds that the root TPM has for one command, and in all for one that it wants to be sent again. */
  'tpm-deadline': number;
  /** `FIRST-LAST`: the host's uids that workers of root's supervisor run as, one each. */
  'worker-uids': string;
  /** Users, beside root and the supervisor's own, whom the drop-in commands serve, with commas between them. */
  'dropin-users': string;
  /** Which vTPMs of other hosts come in: none, those that were here before, or all. */
  'accept-migrations': 'none' | 'known' | 'all';
  /** What vTPMs of other hosts may bring that this host protects less, with commas between them. */
  'migrations-may': string;
  /** Layers of the sandbox that workers may run without, with commas between them. */
  'waive-layers': string;
}

interface Key {
  readonly help: string;
  readonly fallback: string | number;
  readonly values?: readonly string[];
  readonly range?: readonly [number, number];
  /** Of a text that is neither: what it looks like, in words and as an expression. */
  readonly form?: readonly [string, RegExp];
}

/** Every key with its meaning: `vtpmctl config show` and the documentation are made from this table. */
export const CONFIG_KEYS: Readonly<Record<Exclude<keyof Settings, 'home' | 'run-dir'>, Key>> = {
  'log-level': {
    help: 'least important message that is logged',
    fallback: 'info',
    values: ['trace', 'debug', 'info', 'warn', 'error', 'silent'],
  },
  'log-format': {
    help: 'pretty on a terminal, JSON otherwise',
    fallback: 'auto',
    values: ['auto', 'pretty', 'json'],
  },
  isolation: {
    help: 'how workers are confined unless create says',
    fallback: 'sandbox',
    values: ['sandbox', 'vm', 'none'],
  },
  'vm-accelerator': {
    help: 'what runs the VM of a worker with isolation vm: the processor (kvm) or QEMU alone (tcg)',
    fallback: 'auto',
    values: ['auto', 'kvm', 'tcg'],
  },
  'ticket-lifetime': { help: 'seconds until an unused ticket is void', fallback: 120, range: [5, 3600] },
  'worker-stop-timeout': {
    help: 'milliseconds a worker has to stop cleanly before it is killed',
    fallback: 5000,
    range: [100, 60000],
  },
  'restart-burst': {
    help: "restarts of a vTPM's worker that may come at once; above it one each ten seconds",
    fallback: 10,
    range: [1, 1000000],
  },
  'outage-hold': {
    help: 'milliseconds a command is held, while the manager is away, before it is tried',
    fallback: 400,
    range: [10, 60000],
  },
  'pool-min': {
    help: 'sandboxed workers that wait for the next start, at least',
    fallback: 2,
    range: [0, 256],
  },
  'pool-max': {
    help: 'sandboxed workers that wait, at most: as many as were started in the last minute; 0 keeps none',
    fallback: 16,
    range: [0, 256],
  },
  'pool-memory-reserve': {
    help: "MiB of the host's memory that workers which wait leave available",
    fallback: 512,
    range: [0, 16777216],
  },
  checkpoint: {
    help: 'when a worker leaves what the next one needs to go on: always before an answer, or off: its crash is a TPM failure until the VM is reset',
    fallback: 'always',
    values: ['always', 'off'],
  },
  'store-reserve': {
    help: "MiB of the store's file system that only saves of existing vTPMs may use; below it no vTPM is made",
    fallback: 64,
    range: [0, 1048576],
  },
  'anchor-window': {
    help: 'seconds until the root TPM counts saves; each count wears its memory',
    // One count in ten minutes is 52,560 a year; makers speak of 500,000 writes.
    fallback: 600,
    range: [1, 86400],
  },
  'ask-peers-at-start': {
    help: 'seconds that a start waits for peers to say whether they rescued vTPMs from here; 0 does not ask',
    fallback: 5,
    range: [0, 60],
  },
  'erase-after': {
    help: 'hours from a retirement to the rotation of the root key that erases it on old disks too; 0 never',
    fallback: 24,
    range: [0, 8760],
  },
  'peer-listen': {
    help: 'addresses where the manager listens for other hosts, that vTPMs may come; empty: it does not',
    fallback: '',
    form: ['HOST:PORT, several with commas between them', /^[A-Za-z0-9.:%[\], _-]*$/],
  },
  'tpm-deadline': {
    help: 'seconds that the root TPM has to answer a command, and that one is sent again while it is busy',
    fallback: 60,
    range: [1, 600],
  },
  'worker-uids': {
    help: "uids of this host, used by nobody, that workers of root's supervisor run as, one each",
    // In the part of the numbers that systemd's table of uids leaves unused, below what some programs take for negative.
    fallback: '2000000000-2000065535',
    form: ['FIRST-LAST, two numbers', /^\d{1,10}-\d{1,10}$/],
  },
  'dropin-users': {
    help: 'users, beside root, that may make and start vTPMs with the drop-in commands swtpm and swtpm_setup',
    fallback: '',
    form: ['names or numbers of users with commas between them', /^[A-Za-z0-9._, -]*$/],
  },
  'accept-migrations': {
    help: 'vTPMs of other hosts that come in: none, those that were on this host before (known), or all',
    fallback: 'all',
    values: ['none', 'known', 'all'],
  },
  'migrations-may': {
    help: 'what vTPMs of other hosts may bring although it protects them less: isolation-none, mssim, plain',
    fallback: '',
    form: [
      'isolation-none, mssim or plain, several with commas between them',
      /^ *((isolation-none|mssim|plain)( *, *(isolation-none|mssim|plain))*)? *$/,
    ],
  },
  'waive-layers': {
    help: 'layers of the sandbox, by name, that workers run without where the machine cannot give them',
    fallback: '',
    form: ['names of layers with commas between them', /^[a-z:, -]*$/],
  },
};

export type Source = 'flag' | 'environment' | 'file' | 'default';

export interface Configuration {
  readonly settings: Settings;
  readonly sources: Readonly<Record<keyof Settings, Source>>;
  readonly paths: Paths;
}

/** Name of the environment variable of a key: `log-level` is VTPM_LOG_LEVEL. */
export function environmentName(key: string): string {
  return `VTPM_${key.toUpperCase().replaceAll('-', '_')}`;
}

/** @throws ConfigError for an unknown key or a value out of range, naming where it stands */
export function loadConfiguration(
  flags: Partial<Record<keyof Settings, string | number | undefined>>,
  env: NodeJS.ProcessEnv = process.env,
): Configuration {
  const sources = {} as Record<keyof Settings, Source>;
  const pick = (key: keyof Settings, file: Record<string, unknown>, fallback: string | number): unknown => {
    const flag = flags[key];
    const variable = env[environmentName(key)];
    const [value, source]: [unknown, Source] =
      flag !== undefined
        ? [flag, 'flag']
        : variable !== undefined && variable !== ''
          ? [variable, 'environment']
          : file[key] !== undefined
            ? [file[key], 'file']
            : [fallback, 'default'];
    sources[key] = source;
    return value;
  };
  const home = resolve(String(pick('home', {}, defaultHome())));
  const path = pathsOf(home).config;
  const file = readConfigFile(path);
  const run = resolve(String(pick('run-dir', file, defaultRun(home))));
  const settings: Record<string, unknown> = { home, 'run-dir': run };
  for (const [key, spec] of Object.entries(CONFIG_KEYS)) {
    const name = key as keyof typeof CONFIG_KEYS;
    settings[name] = checkValue(name, spec, pick(name, file, spec.fallback), sources[name], path);
  }
  return { settings: settings as unknown as Settings, sources, paths: pathsOf(home, run) };
}

function readConfigFile(path: string): Record<string, unknown> {
  let text: string;
  try {
    text = readFileSync(path, 'utf8');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return {};
    throw new ConfigError(`${path} cannot be read: ${(error as Error).message}`, { cause: error });
  }
  let parsed: unknown;
  try {
    parsed = JSON.parse(text);
  } catch (error) {
    throw new ConfigError(`${path} is not JSON: ${(error as Error).message}`, { cause: error });
  }
  if (typeof parsed !== 'object' || parsed === null || Array.isArray(parsed)) {
    throw new ConfigError(`${path} must hold one JSON object`);
  }
  for (const key of Object.keys(parsed)) {
    if (key !== 'run-dir' && !(key in CONFIG_KEYS)) {
      const known = ['run-dir', ...Object.keys(CONFIG_KEYS)].join(', ');
      throw new ConfigError(`${path}: unknown key "${key}"; the keys are ${known}`);
    }
  }
  return parsed as Record<string, unknown>;
}

function checkValue(key: string, spec: Key, value: unknown, source: Source, path: string): string | number {
  const where =
    source === 'file' ? `${path}: "${key}"` : source === 'environment' ? environmentName(key) : `--${key}`;
  if (spec.range) {
    const number =
      typeof value === 'number' ? value : /^\d+$/.test(String(value)) ? Number(value) : Number.NaN;
    const [least, most] = spec.range;
    if (!Number.isInteger(number) || number < least || number > most) {
      throw new ConfigError(`${where} is a whole number from ${least} to ${most}, not "${String(value)}"`);
    }
    return number;
  }
  if (spec.form) {
    const [words, expression] = spec.form;
    if (typeof value === 'string' && expression.test(value)) return value;
    throw new ConfigError(`${where} is ${words}, not "${String(value)}"`);
  }
  if (typeof value !== 'string' || (spec.values && !spec.values.includes(value))) {
    throw new ConfigError(`${where} is one of ${spec.values?.join(', ')}, not "${String(value)}"`);
  }
  return value;
}
