import { readFileSync } from 'node:fs';
import { Command, Option } from 'commander';
import {
  CONFIG_KEYS,
  ConfigError,
  compileAtFirstCall,
  createLogger,
  forbidCoreDumps,
  loadConfiguration,
  ServiceNotifier,
  VERSION,
} from 'vtpm-common';
import { checkAudit, describeAudit } from './audit-check.js';
import { addBackupCommands } from './backup/commands.js';
import { startDaemon } from './daemon.js';
import { examineHost } from './doctor/index.js';
import { ManagerError } from './error.js';
import { initialise } from './init.js';
import { parseAddresses } from './peer/address.js';
import { addRecoverCommand } from './recover-command.js';
import { addRescueCommand } from './rescue/commands.js';
import { uninstall } from './uninstall.js';

// Before anything secret is in memory: no core dump, no file for others, no slice of a pool that others share.
forbidCoreDumps();
process.umask(0o077);
Buffer.poolSize = 0;
// Without a listener this signal opens Node's debugger, for whoever reaches the port.
process.on('SIGUSR1', () => undefined);
// What a caller's mistake or a guest can cause is handled where it happens; what gets here is a bug, and the process
// ends before it does something it does not know of.
process.on('uncaughtException', (error) => fail(ManagerError.from(error)));
process.on('unhandledRejection', (error) => fail(ManagerError.from(error)));

interface GlobalFlags {
  readonly home?: string;
  readonly runDir?: string;
  readonly logLevel?: string;
  readonly logFormat?: string;
  readonly storeReserve?: string;
  readonly tpmDeadline?: string;
  readonly anchorWindow?: string;
  readonly askPeersAtStart?: string;
  readonly eraseAfter?: string;
  readonly peerListen?: string;
  readonly storeSandbox: boolean;
}

interface InitFlags extends GlobalFlags {
  readonly tpm: string;
  readonly yesEmbedded?: boolean;
  readonly pcrs: string;
  readonly srkHandle: string;
  readonly orderlyCounter?: boolean;
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
  .addOption(new Option('--store-reserve <MiB>', CONFIG_KEYS['store-reserve'].help))
  .addOption(new Option('--anchor-window <seconds>', CONFIG_KEYS['anchor-window'].help))
  .addOption(new Option('--ask-peers-at-start <seconds>', CONFIG_KEYS['ask-peers-at-start'].help))
  .addOption(new Option('--erase-after <hours>', CONFIG_KEYS['erase-after'].help))
  .addOption(new Option('--peer-listen <addresses>', CONFIG_KEYS['peer-listen'].help))
  .addOption(new Option('--tpm-deadline <seconds>', CONFIG_KEYS['tpm-deadline'].help))
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
  .option(
    '--orderly-counter',
    'count in the RAM of the TPM: no wear, and an old disk can pass for the newest after a loss of power',
  )
  .option('--owner-auth-file <file>', "file with the TPM's owner password, where it has one")
  .requiredOption('--toolstack-key <hex>', 'Ed25519 public key of the toolstack, 64 hex digits')
  .option('--json', 'print the result as JSON')
  .action(init);

program
  .command('uninstall')
  .description(
    'removes what init made, in the TPM too, while no vTPM exists; vtpmctl uninstall does this for you',
  )
  .option('--evict', 'the storage root key too, where init made it')
  .option('--force', 'go on where the TPM or the store cannot be reached, and leave it')
  .option('--owner-auth-file <file>', "file with the TPM's owner password, where it has one")
  .option('--json', 'print the result as JSON')
  .action(remove);

program
  .command('doctor')
  .description(
    'looks at the TPM without changing it, and says what is not as it should be; vtpmctl doctor shows more',
  )
  .option('--tpm <tpm>', 'where nothing is initialised: auto, device:PATH, unix:PATH or embedded', 'auto')
  .option('--pcrs <selection>', 'where nothing is initialised: platform state for the root key', 'sha256:7')
  .option('--srk-handle <handle>', 'where nothing is initialised: of the storage root key', '0x81000001')
  .option('--json', 'print the findings as JSON')
  .action(doctor);

program
  .command('audit-verify')
  .description('verifies the audit log while the manager is stopped; vtpmctl audit verify does this for you')
  .option('--json', 'print the result as JSON')
  .action(verifyAuditLog);

addRecoverCommand(program, { setUp, readKey, readSecret });
addBackupCommands(program, { setUp, readKey, readSecret, key });
addRescueCommand(program, { setUp, readKey, readSecret, key });

await program.parseAsync().catch((error: unknown) => fail(error));

async function run(): Promise<void> {
  const { paths, settings, ...common } = setUp(program.opts());
  const { log } = common;
  compileAtFirstCall();
  const service = new ServiceNotifier();
  const daemon = await startDaemon({
    paths,
    storeReserve: settings['store-reserve'],
    anchorWindow: settings['anchor-window'],
    askPeersMs: settings['ask-peers-at-start'] * 1000,
    eraseAfter: settings['erase-after'],
    peerAddresses: parseAddresses(settings['peer-listen']),
    ...common,
  });
  service.ready(`the manager is ${daemon.status}`);
  const stop = (signal: string): void => {
    log.info({ signal }, 'stopping');
    service.stopping();
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
  const { paths, settings: _, ...common } = setUp(flags);
  const result = await initialise({
    paths,
    ...common,
    tpm: flags.tpm,
    mayEmbed: flags.yesEmbedded === true,
    pcrSelection: flags.pcrs,
    srkHandle: handle(flags.srkHandle),
    orderlyCounter: flags.orderlyCounter === true,
    ownerAuth: flags.ownerAuthFile === undefined ? undefined : readSecret(flags.ownerAuthFile),
    toolstackKey: key(flags.toolstackKey),
  });
  const { tpm, managerId, storeId, pcrSelection, recoveryKey, warnings } = result;
  const text = flags.json
    ? JSON.stringify(result)
    : [
        `initialised ${paths.manager.directory}`,
        `  manager   ${managerId}`,
        `  store     ${storeId}`,
        `  TPM       ${tpm.kind} ${tpm.path} (${tpm.manufacturer}, firmware ${tpm.firmwareVersion})`,
        `  released  while ${pcrSelection} is as now`,
        `  recovery  ${recoveryKey}`,
        '            write it down and keep it away from this host: it is shown once, and is the way back without the TPM',
        ...warnings.map((warning) => `  warning   ${warning}`),
      ].join('\n');
  process.stdout.write(`${text}\n`);
}

async function doctor(_flags: object, command: Command): Promise<void> {
  const flags = command.optsWithGlobals<InitFlags>();
  const { settings: _, ...common } = setUp(flags);
  const findings = await examineHost({
    ...common,
    tpm: flags.tpm,
    pcrSelection: flags.pcrs,
    srkHandle: handle(flags.srkHandle),
  });
  const lines = findings.map(({ level, message, fix }) => `${level}: ${message}${fix ? `; ${fix}` : ''}`);
  process.stdout.write(`${flags.json ? JSON.stringify({ findings }) : lines.join('\n')}\n`);
}

async function verifyAuditLog(_flags: object, command: Command): Promise<void> {
  const flags = command.optsWithGlobals<InitFlags>();
  const { settings: _, ...common } = setUp(flags);
  const view = await checkAudit(common);
  process.stdout.write(`${flags.json ? JSON.stringify(view) : describeAudit(view).join('\n')}\n`);
}

interface UninstallFlags extends GlobalFlags {
  readonly evict?: boolean;
  readonly force?: boolean;
  readonly ownerAuthFile?: string;
  readonly json?: boolean;
}

async function remove(_flags: object, command: Command): Promise<void> {
  const flags = command.optsWithGlobals<UninstallFlags>();
  const { settings: _, ...common } = setUp(flags);
  const { removed, left } = await uninstall({
    ...common,
    evict: flags.evict === true,
    force: flags.force === true,
    ownerAuth: flags.ownerAuthFile === undefined ? undefined : readSecret(flags.ownerAuthFile),
  });
  const lines = [...removed.map((what) => `removed  ${what}`), ...left.map((what) => `left     ${what}`)];
  process.stdout.write(`${flags.json ? JSON.stringify({ removed, left }) : lines.join('\n')}\n`);
}

function setUp(flags: GlobalFlags) {
  const { paths, settings } = loadConfiguration({
    home: flags.home,
    'run-dir': flags.runDir,
    'log-level': flags.logLevel,
    'log-format': flags.logFormat,
    'store-reserve': flags.storeReserve,
    'anchor-window': flags.anchorWindow,
    'ask-peers-at-start': flags.askPeersAtStart,
    'erase-after': flags.eraseAfter,
    'peer-listen': flags.peerListen,
    'tpm-deadline': flags.tpmDeadline,
  });
  return {
    paths,
    settings,
    log: createLogger('vtpm-managerd', settings),
    storeSandbox: flags.storeSandbox,
    tpmDeadlineMs: settings['tpm-deadline'] * 1000,
  };
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

/** What `parse` makes of a file with a key. */
function readKey(path: string, parse: (text: string) => Buffer): Buffer {
  const text = readSecret(path);
  try {
    return parse(text.toString());
  } finally {
    text.fill(0);
  }
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

function fail(thrown: unknown): never {
  // A bug keeps its stack; what a disk or a caller did has a name.
  const named = ManagerError.from(thrown);
  const error = named.code === 'internal' ? thrown : named;
  const isNamed = error instanceof ManagerError || error instanceof ConfigError;
  const code = error instanceof ManagerError ? ` (${error.code})` : '';
  const message = error instanceof Error ? error.message : String(error);
  process.stderr.write(`vtpm-managerd: ${message}${code}\n`);
  if (!isNamed && error instanceof Error) process.stderr.write(`${error.stack}\n`);
  process.exit(1);
}
