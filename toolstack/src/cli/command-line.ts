import { Command, CommanderError, Option } from 'commander';
import { CONFIG_KEYS, defaultHome, libtpmsVersion, VERSION } from 'vtpm-common';
import { DEFAULT_DOORS, DOOR_KINDS } from '../supervisor/door-kinds.js';
import { addBackupCommands } from './backup-commands.js';
import { auditCommands } from './commands/audit.js';
import { showConfig } from './commands/config.js';
import { type CreateFlags, create } from './commands/create.js';
import { type DoctorFlags, doctor } from './commands/doctor.js';
import { down } from './commands/down.js';
import { exec } from './commands/exec.js';
import { type AllowFlags, allowImage, listImages, removeImage, showImage } from './commands/image.js';
import { type BuildVmFlags, buildVm } from './commands/image-vm.js';
import { type InitFlags, init } from './commands/init.js';
import { remove, start, stop } from './commands/lifecycle.js';
import { list, show } from './commands/list.js';
import { type LogsFlags, logs } from './commands/logs.js';
import { type SetFlags, set } from './commands/set.js';
import { upgradeSupervisor } from './commands/supervisor.js';
import { type UninstallFlags, uninstall } from './commands/uninstall.js';
import { up } from './commands/up.js';
import type { Context } from './context.js';
import { EXIT } from './exit-status.js';
import { addMigrateCommands } from './migrate-commands.js';
import { addPeerCommands } from './peer-commands.js';
import { addPlatformCommands } from './platform-commands.js';
import { addVmmCommands } from './vmm-commands.js';

/** The flags that every command takes, before or after its name. */
export interface GlobalFlags {
  readonly home?: string;
  readonly runDir?: string;
  readonly json?: boolean;
  readonly logLevel?: string;
  readonly logFormat?: string;
}

/** A command's work; a number is the exit status where it is not 0. */
export type Work = (context: Context) => Promise<number> | Promise<void> | void;
/** Makes a command with examples in its help. */
export type Add = (
  parent: Command,
  usage: string,
  description: string,
  examples: readonly string[],
) => Command;
/** Does the work with the context that the flags of `command` make. */
export type Run = (command: Command, work: Work) => Promise<void>;

const EXIT_STATUSES = `
Exit status:
  ${EXIT.ok}  done
  ${EXIT.failed}  refused or failed
  ${EXIT.usage}  wrong usage: a flag, an argument or the configuration file
  ${EXIT.notRunning}  not running or not reachable
  ${EXIT.locked}  locked: the platform is not in the state that releases the manager's keys
  exec ends with the status of the program it ran.`;

/** vtpmctl's commands, flags, arguments and help. Wrong usage is thrown as a CommanderError. */
export function createProgram(run: Run, isJson: boolean): Command {
  const program = new Command('vtpmctl')
    // With --json what is wrong is said once, as JSON, by the caller.
    .configureOutput(
      isJson
        ? { writeErr: () => {} }
        : { outputError: (text, write) => write(text.replace(/^error: /, 'vtpmctl: ')) },
    )
    .description('Makes, runs and inspects the virtual TPMs of this host.')
    .enablePositionalOptions()
    .exitOverride()
    .showHelpAfterError('(--help shows the usage)')
    .configureHelp({ showGlobalOptions: true })
    .option('-V, --version', 'versions of vtpmctl and of libtpms')
    .on('option:version', () => {
      process.stdout.write(`vtpmctl ${VERSION}\n${sayLibtpms()}\n`);
      throw new CommanderError(0, 'commander.version', '');
    })
    .addHelpText(
      'after',
      `
Examples:
  vtpmctl init --tpm auto                          once: enrol with the TPM of this machine
  vtpmctl up                                       start manager and supervisor in the background
  vtpmctl create web1 && vtpmctl start web1
  vtpmctl exec web1 -- tpm2_getrandom --hex 8      any TPM program, on web1
${EXIT_STATUSES}`,
    );
  for (const option of globalOptions()) program.addOption(option);

  const add: Add = (parent, usage, description, examples) => {
    const command = parent
      .command(usage)
      .description(description)
      .addHelpText('after', `\nExamples:\n${examples.map((example) => `  ${example}`).join('\n')}`);
    for (const option of globalOptions()) command.addOption(option.hideHelp());
    return command;
  };

  const initCommand = add(program, 'init', 'makes an installation: enrols with a TPM, makes keys and store', [
    'vtpmctl init --tpm auto                     the TPM chip of this machine',
    'vtpmctl init --tpm device:/dev/tpmrm0 --pcrs sha256:0,2,7',
    'vtpmctl init --tpm embedded                 a software TPM: for trying things, protects nothing',
    'vtpmctl --home /srv/second init --tpm auto  a second installation beside the first',
  ])
    .option('--tpm <tpm>', 'needed: auto, device:PATH, unix:PATH or embedded')
    .option('--yes-embedded', 'let auto take the embedded TPM where there is no chip')
    .option('--pcrs <selection>', 'platform state that releases the root key (default: sha256:7)')
    .option('--srk-handle <handle>', 'persistent handle of the storage root key (default: 0x81000001)')
    .option(
      '--orderly-counter',
      'count in the RAM of the TPM: no wear, and an old disk can pass for the newest after a loss of power',
    )
    .option('--owner-auth-file <file>', "file with the TPM's owner password, where it has one")
    .option('--recovery-key-file <file>', 'keep the recovery key in this file instead of showing it');
  initCommand.action((flags: InitFlags) => run(initCommand, (context) => init(flags, context)));

  const upCommand = add(program, 'up', 'starts manager and supervisor in the background', [
    'vtpmctl up',
    'vtpmctl up --log-level debug',
  ]);
  upCommand.action(() => run(upCommand, up));

  const downCommand = add(program, 'down', 'stops all vTPMs, the supervisor and the manager', [
    'vtpmctl down',
  ]);
  downCommand.action(() => run(downCommand, down));

  const doctorCommand = add(
    program,
    'doctor',
    'looks for what is not as it should be, and says what mends it',
    [
      'vtpmctl doctor                                  before init, too',
      'vtpmctl doctor --tpm device:/dev/tpmrm0 --pcrs sha256:0,2,4,7',
      'vtpmctl doctor --json',
    ],
  )
    .option('--tpm <tpm>', 'before init: auto, device:PATH, unix:PATH or embedded (default: auto)')
    .option('--pcrs <selection>', 'before init: the platform state you think of (default: sha256:7)')
    .option('--srk-handle <handle>', 'before init: of the storage root key (default: 0x81000001)');
  doctorCommand.action((flags: DoctorFlags) => run(doctorCommand, (context) => doctor(flags, context)));

  const uninstallCommand = add(
    program,
    'uninstall',
    'removes what init made, on disk and in the TPM, while no vTPM exists',
    [
      'vtpmctl uninstall',
      'vtpmctl uninstall --evict --yes      the storage root key too, where init made it',
    ],
  )
    .option('--evict', 'remove the storage root key too, where init made it; other programs may use it')
    .option('--force', 'go on where the TPM or the store is gone, and leave what is in them')
    .option('--owner-auth-file <file>', "file with the TPM's owner password, where it has one")
    .option('--yes', 'do not ask');
  uninstallCommand.action((flags: UninstallFlags) =>
    run(uninstallCommand, (context) => uninstall(flags, context)),
  );

  const createCommand = add(program, 'create', 'registers a vTPM; its TPM is made by the first start', [
    'vtpmctl create web1',
    'vtpmctl create web1 --vm-uuid 0b8f7a52-3c1d-4f0e-9a6b-2f3c4d5e6f70 --autostart',
    'vtpmctl create web1 --socket-owner libvirt-qemu:kvm     for the virtual machines that libvirt starts',
  ])
    .argument('<name>', '1 to 63 of a-z, 0-9, ".", "_" and "-"')
    .option('--vm-uuid <uuid>', 'the VM it belongs to (default: a new UUID)')
    .option('--adopt <id>', 'of a vTPM that the manager keeps and that has no name: after a rebuild')
    .addOption(
      new Option('--isolation <kind>', 'how its worker is confined (default: as config show says)').choices([
        'sandbox',
        'vm',
        'none',
      ]),
    )
    .option('--autostart', 'start it with the supervisor')
    .addOption(startupOption())
    .addOption(doorsOption())
    .addOption(
      new Option(
        '--state-blobs <kind>',
        'what its VMM takes out to migrate or snapshot: a reference, which works once here, or the state itself (default: reference)',
      ).choices(['reference', 'plain']),
    )
    .option('--socket-owner <user:group>', "whom its sockets belong to (default: the supervisor's user)")
    .option('--socket-mode <mode>', '0600 or 0660 (default: 0660 with a group in --socket-owner, else 0600)');
  for (const option of ['--id <id>', '--dropin <json>', '--arriving <json>'])
    createCommand.addOption(new Option(option).hideHelp());
  createCommand.action((name: string, flags: CreateFlags) =>
    run(createCommand, (context) => create(name, flags, context)),
  );

  const setCommand = add(program, 'set', 'changes a vTPM that is stopped', [
    'vtpmctl set web1 --doors tpm,tcti',
    'vtpmctl set web1 --doors tpm,tcti,control --startup none      for a VM',
  ])
    .argument('<name>', 'name or id')
    .addOption(doorsOption())
    .addOption(startupOption());
  setCommand.action((name: string, flags: SetFlags) =>
    run(setCommand, (context) => set(name, flags, context)),
  );

  const startCommand = add(program, 'start', 'starts a vTPM and waits until its doors are open', [
    'vtpmctl start web1',
  ]).argument('<name>', 'name or id');
  startCommand.action((name: string) => run(startCommand, (context) => start(name, context)));

  const stopCommand = add(program, 'stop', 'stops a vTPM in order; its state is kept', [
    'vtpmctl stop web1',
  ]).argument('<name>', 'name or id');
  stopCommand.action((name: string) => run(stopCommand, (context) => stop(name, context)));

  const deleteCommand = add(program, 'delete', 'destroys a vTPM with its keys and state, for good', [
    'vtpmctl delete web1',
    'vtpmctl delete web1 --yes',
    'vtpmctl delete 0b8f7a52-3c1d-4f0e-9a6b-2f3c4d5e6f70   an orphan that vtpmctl list shows',
  ])
    .argument('<name>', 'name or id')
    .option('--yes', 'do not ask');
  deleteCommand.action((name: string, flags: { yes?: boolean }) =>
    run(deleteCommand, (context) => remove(name, flags, context)),
  );

  const listCommand = add(program, 'list', 'shows all vTPMs, and those that only one of the daemons knows', [
    'vtpmctl list',
    'vtpmctl list --json',
  ]).alias('ls');
  listCommand.action(() => run(listCommand, list));

  const showCommand = add(program, 'show', 'shows everything about one vTPM', [
    'vtpmctl show web1',
    'vtpmctl show web1 --json',
  ]).argument('<name>', 'name or id');
  showCommand.action((name: string) => run(showCommand, (context) => show(name, context)));

  const execCommand = add(program, 'exec', 'runs a program whose TPM is the vTPM', [
    'vtpmctl exec web1 -- tpm2_getrandom --hex 8',
    'vtpmctl exec web1 -- tpm2_pcrread sha256:7',
    'vtpmctl exec web1 -- bash                      a shell in which every tpm2_ command uses web1',
  ])
    .argument('<name>', 'name or id')
    .argument('[program...]', 'the program and its arguments, after --')
    .passThroughOptions();
  execCommand.action((name: string, command: string[]) =>
    run(execCommand, (context) => exec(name, command, context)),
  );

  addVmmCommands(program, add, run);

  const logsCommand = add(program, 'logs', 'shows what the daemons logged, or what concerns one vTPM', [
    'vtpmctl logs',
    'vtpmctl logs web1 -f',
  ])
    .argument('[name]', 'name or id')
    .option('-f, --follow', 'go on until interrupted')
    .option('-n, --lines <count>', 'lines to begin with', '200');
  logsCommand.action((name: string | undefined, flags: LogsFlags) =>
    run(logsCommand, (context) => logs(name, flags, context)),
  );

  const imageCommand = group(program, 'image', 'the worker images to which the manager gives state');
  const imageList = add(imageCommand, 'list', 'shows the allowed worker images', ['vtpmctl image list']);
  imageList.action(() => run(imageList, listImages));
  const imageAllow = add(imageCommand, 'allow', 'allows a worker image', [
    'vtpmctl image allow                                the one that the supervisor runs',
    'vtpmctl image allow DIGEST --note "release 1.2"',
    'vtpmctl image allow --installed                    what dpkg vouches for, after an upgrade',
  ])
    .argument('[digest]', '64 hex digits (default: the image that the supervisor runs)')
    .option('--note <text>', 'why, for who reads the list later')
    .option(
      '--installed',
      'the image that the installed packages make, if each of its files is as its package has it',
    )
    .option('--replace', 'with --installed: remove the images that were allowed like this before');
  imageAllow.action((digest: string | undefined, flags: AllowFlags) =>
    run(imageAllow, (context) => allowImage(digest, flags, context)),
  );
  const imageShow = add(imageCommand, 'show', 'shows what is in the image that the supervisor runs', [
    'vtpmctl image show',
  ]);
  imageShow.action(() => run(imageShow, showImage));
  const imageRemove = add(imageCommand, 'remove', 'no vTPM starts from this image any more', [
    'vtpmctl image remove DIGEST',
  ])
    .alias('deny')
    .argument('<digest>', '64 hex digits');
  imageRemove.action((digest: string) => run(imageRemove, (context) => removeImage(digest, context)));
  const imageBuildVm = add(imageCommand, 'build-vm', 'makes the image for workers in VMs (--isolation vm)', [
    'vtpmctl image build-vm                             from the packages that apt finds',
    'vtpmctl image build-vm --allow                     and lets the manager give state to it',
    'vtpmctl image build-vm --kernel-deb linux-image-6.1.0-56-cloud-amd64_6.1.192-2_amd64.deb',
  ])
    .option('--kernel-deb <file>', "Debian's linux-image-…-cloud-amd64 (default: downloaded with apt-get)")
    .option('--busybox-deb <file>', "Debian's busybox-static (default: downloaded with apt-get)")
    .option('--allow', 'allow it at the manager too')
    .option('--note <text>', 'with --allow: why, for who reads the list later');
  imageBuildVm.action((flags: BuildVmFlags) => run(imageBuildVm, (context) => buildVm(flags, context)));

  const supervisorCommand = group(program, 'supervisor', 'the parent of all workers');
  const supervisorUpgrade = add(
    supervisorCommand,
    'upgrade',
    'lets the running supervisor go on as the program that is installed now; no guest notices',
    ['vtpmctl supervisor upgrade'],
  );
  supervisorUpgrade.action(() => run(supervisorUpgrade, upgradeSupervisor));

  const platformCommand = group(
    program,
    'platform',
    'the platform states in which the TPM releases the root key, and that key',
  );
  addPlatformCommands(program, platformCommand, add, run);
  addBackupCommands(program, add, run);
  addPeerCommands(program, add, run);
  addMigrateCommands(program, add, run);

  auditCommands(
    group(program, 'audit', 'the log of what was done with this installation, and by whom'),
    add,
    run,
  );

  const configCommand = group(program, 'config', 'the settings of this installation');
  const configShow = add(configCommand, 'show', 'shows every setting and where its value comes from', [
    'vtpmctl config show',
    'VTPM_LOG_LEVEL=debug vtpmctl config show --json',
  ]);
  configShow.action(() => run(configShow, showConfig));
  return program;
}

function startupOption(): Option {
  return new Option(
    '--startup <kind>',
    'clear: send TPM2_Startup(CLEAR) before anybody is served; none: the firmware does (default: none with the door control, else clear)',
  ).choices(['clear', 'none']);
}

function doorsOption(): Option {
  return new Option(
    '--doors <kinds>',
    `which doors it has, with commas between: ${DOOR_KINDS.join(', ')} (default: ${DEFAULT_DOORS.join(',')})`,
  ).argParser((text: string) => text.split(','));
}

/** A command that only has commands. */
function group(program: Command, name: string, description: string): Command {
  const command = program.command(name).description(description);
  for (const option of globalOptions()) command.addOption(option.hideHelp());
  return command;
}

function globalOptions(): Option[] {
  return [
    new Option('--home <dir>', `directory of the installation (default: ${defaultHome()})`),
    new Option('--run-dir <dir>', 'directory of its sockets'),
    new Option('--json', 'results as JSON, errors as JSON on standard error'),
    new Option('--log-level <level>', 'of the daemons that up starts').choices([
      ...(CONFIG_KEYS['log-level'].values ?? []),
    ]),
    new Option('--log-format <format>', 'of the daemons that up starts').choices([
      ...(CONFIG_KEYS['log-format'].values ?? []),
    ]),
  ];
}

function sayLibtpms(): string {
  try {
    return `libtpms ${libtpmsVersion()}`;
  } catch (error) {
    return (error as Error).message;
  }
}
