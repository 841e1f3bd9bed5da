import { Command, Option } from 'commander';
import {
  ConfigError,
  compileAtFirstCall,
  createLogger,
  forbidCoreDumps,
  loadConfiguration,
  ServiceNotifier,
  VERSION,
} from 'vtpm-common';
import { ToolstackError } from './error.js';
import { serveApi } from './supervisor/api.js';
import { DropinServer } from './supervisor/dropin/server.js';
import { dropinUids } from './supervisor/dropin/users.js';
import { takeSignals } from './supervisor/handover/early-signals.js';
import { checkInheritance, takeInheritance } from './supervisor/handover/inheritance.js';
import { CHECK_FLAG, HANDOVER_FLAG } from './supervisor/handover/names.js';
import { defaultManifest } from './supervisor/image-sources.js';
import { openSupervisor } from './supervisor/open-supervisor.js';

// It holds the key that signs tickets: no core dump, and no debugger, which Node opens at this signal.
forbidCoreDumps();
process.on('SIGUSR1', () => undefined);

interface Flags {
  readonly home?: string;
  readonly runDir?: string;
  readonly logLevel?: string;
  readonly logFormat?: string;
  readonly ticketLifetime?: string;
  readonly workerStopTimeout?: string;
  readonly restartBurst?: string;
  readonly outageHold?: string;
  readonly poolMin?: string;
  readonly poolMax?: string;
  readonly poolMemoryReserve?: string;
  readonly vmAccelerator?: string;
  readonly checkpoint?: string;
  readonly storeReserve?: string;
  readonly workerUids?: string;
  readonly waiveLayers?: string;
  readonly dropinUsers?: string;
  readonly acceptMigrations?: string;
  readonly migrationsMay?: string;
  readonly workerManifest?: string;
  readonly handover?: string;
  readonly checkHandover?: string;
}

const program = new Command('vtpm-supervisord')
  .description(
    'The parent of every vTPM worker of an installation. Runs in the foreground; SIGTERM stops all workers.',
  )
  .version(VERSION)
  .option('--home <dir>', 'state of the installation')
  .option('--run-dir <dir>', 'sockets of the installation')
  .option('--log-level <level>', 'least important message that is logged')
  .option('--log-format <format>', 'auto, pretty or json')
  .option('--ticket-lifetime <seconds>', 'until an unused ticket is void')
  .option('--worker-stop-timeout <ms>', 'that a worker has to stop cleanly before it is killed')
  .option('--vm-accelerator <kind>', 'what runs the VMs of workers: auto, kvm or tcg')
  .option('--restart-burst <count>', "restarts of a vTPM's worker that may come at once")
  .option('--outage-hold <ms>', 'that a command is held, while the manager is away, before it is tried')
  .option('--pool-min <count>', 'workers that wait for a start, at least')
  .option('--pool-max <count>', 'workers that wait for a start, at most')
  .option('--pool-memory-reserve <MiB>', 'of memory that waiting workers leave available')
  .option('--checkpoint <when>', 'always, or off: a crash of a worker is then a TPM failure')
  .option('--store-reserve <MiB>', 'of disk that is kept for the vTPMs there are')
  .option('--worker-uids <range>', 'uids that workers run as, one each: FIRST-LAST')
  .option('--waive-layers <names>', 'layers of the sandbox that workers may run without')
  .option('--dropin-users <names>', 'users whom the drop-in commands serve, beside root')
  .option('--accept-migrations <which>', 'vTPMs of other hosts that come in: none, known or all')
  .option('--migrations-may <what>', 'they may bring: isolation-none, mssim, plain')
  .addOption(new Option('--worker-manifest <file>', 'another worker image, for fault tests').hideHelp())
  // What the program before this one hands over, and whether this one would take it; see handover/upgrade.ts.
  .addOption(new Option(`${HANDOVER_FLAG} <descriptor>`).hideHelp())
  .addOption(new Option(`${CHECK_FLAG} <descriptor>`).hideHelp())
  .allowExcessArguments(false)
  .action(run);

async function run(flags: Flags): Promise<void> {
  // Sockets and state are for this user alone from the moment they exist.
  process.umask(0o077);
  const { settings, paths } = loadConfiguration({
    home: flags.home,
    'run-dir': flags.runDir,
    'log-level': flags.logLevel,
    'log-format': flags.logFormat,
    'ticket-lifetime': flags.ticketLifetime,
    'worker-stop-timeout': flags.workerStopTimeout,
    'restart-burst': flags.restartBurst,
    'outage-hold': flags.outageHold,
    'pool-min': flags.poolMin,
    'pool-max': flags.poolMax,
    'pool-memory-reserve': flags.poolMemoryReserve,
    'vm-accelerator': flags.vmAccelerator,
    checkpoint: flags.checkpoint,
    'store-reserve': flags.storeReserve,
    'worker-uids': flags.workerUids,
    'waive-layers': flags.waiveLayers,
    'dropin-users': flags.dropinUsers,
    'accept-migrations': flags.acceptMigrations,
    'migrations-may': flags.migrationsMay,
  });
  const log = createLogger('vtpm-supervisord', settings);
  const service = new ServiceNotifier();
  const manifest = flags.workerManifest ?? defaultManifest();
  const uids = dropinUids(settings['dropin-users']);
  if (flags.checkHandover !== undefined)
    return checkInheritance(flags.checkHandover, { paths, settings, manifest });
  compileAtFirstCall();
  const before = flags.handover === undefined ? undefined : takeInheritance(flags.handover);
  const supervisor = await openSupervisor({ paths, settings, manifest, log, ...(before && { before }) });
  const dropin = await DropinServer.open({ supervisor, paths, log, uids }, before !== undefined);
  const api = await serveApi(supervisor, dropin, paths.supervisor.socket, log, before);
  before?.descriptors.closeRest();
  log.info(
    { home: paths.home, imageDigest: supervisor.image.digest, vtpms: supervisor.all().length },
    'ready',
  );
  service.ready(`${supervisor.all().length} vTPMs`);
  const refresh = (): void => {
    try {
      supervisor.refreshImage();
    } catch (error) {
      log.error({ reason: (error as Error).message }, 'workers go on starting from the image before');
    }
  };
  let isStopping = false;
  const stop = async (signal: string): Promise<void> => {
    if (isStopping) return;
    isStopping = true;
    log.info({ signal }, 'stopping all workers');
    service.stopping();
    const closed = supervisor.close();
    await Promise.all([api.close(closed), dropin.close(closed)]);
    log.info('stopped');
    process.exit(0);
  };
  takeSignals({
    SIGTERM: () => void stop('SIGTERM'),
    SIGINT: () => void stop('SIGINT'),
    SIGHUP: refresh,
  });
}

try {
  await program.parseAsync();
} catch (thrown) {
  const error = thrown instanceof ConfigError ? thrown : ToolstackError.from(thrown);
  // A bug keeps its stack; what a disk or a caller did has a name.
  if (error instanceof ToolstackError && error.code === 'internal') throw thrown;
  const code = error instanceof ToolstackError ? error.code : 'usage';
  process.stderr.write(`vtpm-supervisord: ${error.message} [${code}]\n`);
  process.exit(1);
}
