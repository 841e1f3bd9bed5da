import { parseArgs } from 'node:util';
import { VtpmdError } from './error.js';
import { startSoftTpm } from './softtpm/softtpm.js';
import { createWorkerLog } from './worker/log.js';

const USAGE = `Usage: vtpm-softtpm --state DIR --socket PATH [--create] [--log-level debug|info|warn|error]

A software TPM 2.0 that stands in for a TPM chip. It speaks raw TPM commands on a unix socket that only its owner
reaches, and prints "ready" when it listens.

  --state DIR     directory of its state
  --socket PATH   where it listens
  --create        make a new TPM where DIR holds none
  --log-level L   least important message that is logged (default: info)
`;

const LEVELS = ['debug', 'info', 'warn', 'error'] as const;

function readArguments(): { state: string; socket: string; create: boolean; level: (typeof LEVELS)[number] } {
  let values: Record<string, string | boolean | undefined>;
  try {
    ({ values } = parseArgs({
      options: {
        state: { type: 'string' },
        socket: { type: 'string' },
        create: { type: 'boolean', default: false },
        'log-level': { type: 'string', default: 'info' },
        help: { type: 'boolean', default: false },
      },
    }));
  } catch (cause) {
    throw new VtpmdError('bad-arguments', (cause as Error).message, { cause });
  }
  if (values.help === true) {
    process.stdout.write(USAGE);
    process.exit(0);
  }
  const { state, socket, create } = values;
  if (typeof state !== 'string' || typeof socket !== 'string') {
    throw new VtpmdError('bad-arguments', '--state and --socket are needed; --help says more');
  }
  const level = LEVELS.find((name) => name === values['log-level']);
  if (!level) throw new VtpmdError('bad-arguments', `--log-level is one of ${LEVELS.join(', ')}`);
  return { state, socket, create: create === true, level };
}

function fail(unknown: unknown): never {
  const error = VtpmdError.from(unknown);
  process.stderr.write(`vtpm-softtpm: ${error.reason}: ${error.message}\n`);
  process.exit(error.code === 'bad-arguments' ? 64 : 1);
}

// Without a listener this signal opens Node's debugger.
process.on('SIGUSR1', () => {});

try {
  const { state, socket, create, level } = readArguments();
  const log = createWorkerLog('vtpm-softtpm', level);
  const tpm = await startSoftTpm({ state, socket, create, log, onFailure: fail });
  const stop = (): void => {
    tpm.stop().then(() => process.exit(0), fail);
  };
  process.once('SIGTERM', stop);
  process.once('SIGINT', stop);
  process.stdout.write('ready\n');
} catch (error) {
  fail(error);
}
