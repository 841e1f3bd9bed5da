import type { Command } from 'commander';
import type { Add, Run } from './command-line.js';
import { type DoctorFlags, doctor } from './commands/doctor.js';
import { down } from './commands/down.js';
import { type InitFlags, init } from './commands/init.js';
import { type UninstallFlags, uninstall } from './commands/uninstall.js';
import { up } from './commands/up.js';

/** What makes an installation, starts it, looks at it and removes it. */
export function addInstallationCommands(program: Command, add: Add, run: Run): void {
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
}
