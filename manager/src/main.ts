import { readFileSync } from 'node:fs';
import { Command, Option } from 'commander';
import {
  CONFIG_KEYS,
  ConfigError,
  createLogger,
  forbidCoreDumps,
  loadConfiguration,
  VERSION,
} from 'vtpm-common';
import { startDaemon } from './daemon.js';
import { ManagerError } from './error.js';
import { initialise } from './init.js';

// Before anything secret is in memory: no core dump, no file for others, no slice of a pool that others share.
forbidCoreDumps();
process.umask(0o077);
Buffer.poolSize = 0;
// What a caller's mistake or a guest can cause is handled where it happens; what gets here is a bug, and the process
// ends before it does something it does not know of.
process.on('uncaughtException', (error) => fail(ManagerError.from(error)));
process.on('unhandledRejection', (error) => fail(ManagerError.from(error)));

interface GlobalFlags {
  readonly home?: string;
  readonly runDir?: string;
  readonly logLevel?: string;
  readonly logFormat?: string;
  readonly storeSandbox: boolean;
}

interface InitFlags extends GlobalFlags {
  readonly tpm: string;
  readonly yesEmbedded?: boolean;
  readonly pcrs: string;
  readonly srkHandle: string;
  readonly ownerAuthFile?: string;
  readonly toolstackKey: string;
  readonly json?: boolean;
}

const program = new Command('vtpm-managerd')
  .description('Keeps the state of virtual TPMs, protected by the TPM of this host. Runs in the foreground.')
  .version(VERSION)
  .option('--home <dir>', 'directory of the installation')
  .option('--run-dir <dir>', 'directory of the sockets')
  .addOption(new Option('--log-level <level>', CONFIG_KEYS['log-level'].help))
  .addOption(new Option('--log-format <format>', CONFIG_KEYS['log-format'].help))
  .option('--no-store-sandbox', 'run the store process without bubblewrap (hosts without user namespaces)')
  .addHelpText(
    'after',
    '\nExamples:\n  vtpm-managerd --home /var/lib/vtpm-manager\n  vtpm-managerd init --home /srv/vtpm --tpm device:/dev/tpmrm0 --toolstack-key HEX\n\n' +
      'Exit codes: 0 stopped in order, 1 refused or failed (the reason is on standard error).\n',
  )
  .action(run);

program
  .command('init')
  .description('enrols with the TPM and makes the store; vtpmctl init does this for you')
  .option('--tpm <tpm>', 'auto, device:PATH, unix:PATH or embedded', 'auto')
  .option('--yes-embedded', 'let auto take the embedded TPM: nothing is hardware-protected then')
  .option('--pcrs <selection>', 'platform state that releases the root key', 'sha256:7')
  .option('--srk-handle <handle>', 'persistent handle of the storage root key', '0x81000001')
  .option('--owner-auth-file <file>', "file with the TPM's owner password, where it has one")
  .requiredOption('--toolstack-key <hex>', 'Ed25519 public key of the toolstack, 64 hex digits')
  .option('--json', 'print the result as JSON')
  .action(init);

await program.parseAsync().catch((error: unknown) => fail(error));

async function run(): Promise<void> {
  const { paths, log, storeSandbox } = setUp(program.opts());
  const daemon = await startDaemon({ paths, log, storeSandbox });
  const stop = (signal: string): void => {
    log.info({ signal }, 'stopping');
    daemon.stop().then(
      () => process.exit(0),
      (error: unknown) => fail(error),
    );
  };
  process.once('SIGTERM', stop);
  process.once('SIGINT', stop);
}

async function init(_flags: object, command: Command): Promise<void> {
  const flags = command.optsWithGlobals<InitFlags>();
  const { paths, log, storeSandbox } = setUp(flags);
  const result = await initialise({
    paths,
    log,
    storeSandbox,
    tpm: flags.tpm,
    mayEmbed: flags.yesEmbedded === true,
    pcrSelection: flags.pcrs,
    srkHandle: handle(flags.srkHandle),
    ownerAuth: flags.ownerAuthFile === undefined ? undefined : readSecret(flags.ownerAuthFile),
    toolstackKey: key(flags.toolstackKey),
  });
  const { tpm, managerId, storeId, pcrSelection, warnings } = result;
  const text = flags.json
    ? JSON.stringify(result)
    : [
        `initialised ${paths.manager.directory}`,
        `  manager   ${managerId}`,
        `  store     ${storeId}`,
        `  TPM       ${tpm.kind} ${tpm.path} (${tpm.manufacturer}, firmware ${tpm.firmwareVersion})`,
        `  released  while ${pcrSelection} is as now`,
        ...warnings.map((warning) => `  warning   ${warning}`),
      ].join('\n');
  process.stdout.write(`${text}\n`);
}

function setUp(flags: GlobalFlags) {
  const { paths, settings } = loadConfiguration({
    home: flags.home,
    'run-dir': flags.runDir,
    'log-level': flags.logLevel,
    'log-format': flags.logFormat,
  });
  return { paths, log: createLogger('vtpm-managerd', settings), storeSandbox: flags.storeSandbox };
}

function handle(text: string): number {
  const value = /^0x[0-9a-f]{8}$/i.test(text) ? Number(text) : 0;
  if (value >>> 24 !== 0x81) {
    throw new ManagerError(
      'bad-request',
      `--srk-handle is a persistent handle such as 0x81000001, not "${text}"`,
    );
  }
  return value;
}

function key(text: string): Buffer {
  if (!/^[0-9a-f]{64}$/i.test(text)) {
    throw new ManagerError('bad-request', '--toolstack-key is an Ed25519 public key of 64 hex digits');
  }
  return Buffer.from(text, 'hex');
}

/** The file's content without a line end. */
function readSecret(path: string): Buffer {
  const content = readFileSync(path);
  const end = content.at(-1) === 0x0a ? content.length - 1 : content.length;
  const secret = Buffer.alloc(end);
  secret.set(content.subarray(0, end));
  content.fill(0);
  return secret;
}

function fail(error: unknown): never {
  const isNamed = error instanceof ManagerError || error instanceof ConfigError;
  const code = error instanceof ManagerError ? ` (${error.code})` : '';
  const message = error instanceof Error ? error.message : String(error);
  process.stderr.write(`vtpm-managerd: ${message}${code}\n`);
  if (!isNamed && error instanceof Error) process.stderr.write(`${error.stack}\n`);
  process.exit(1);
}
