import type { Command } from 'commander';
import type { Run } from './command-line.js';
import {
  type BackupFlags,
  backup,
  inspect,
  keygen,
  type RebuildFlags,
  type RestoreFlags,
  rebuild,
  restore,
} from './commands/backup.js';
import type { Add } from './platform-commands.js';

/** `backup`, `restore`, `rebuild` and `inspect`. */
export function addBackupCommands(program: Command, add: Add, run: Run): void {
  const backupCommand = add(
    program,
    'backup',
    'writes vTPMs into a file, encrypted to a key of yours, while they run',
    [
      'vtpmctl backup keygen -o /media/key/backup.key    once; the public half is printed',
      'vtpmctl backup --to vtpm-backup-public-1-… -o /media/backup/monday.vtpm',
      'vtpmctl backup --to vtpm-backup-public-1-… -o web1.vtpm web1',
    ],
  )
    .option('--to <key>', 'public half of the backup key, needed')
    .option('-o, --output <file>', 'needed; never written over')
    .argument('[name...]', 'names or ids (default: every vTPM)');
  backupCommand.action((names: string[], flags: BackupFlags) =>
    run(backupCommand, (context) => backup(names, flags, context)),
  );
  const keygenCommand = add(
    backupCommand,
    'keygen',
    'makes a backup key; keep its file away from this host',
    ['vtpmctl backup keygen -o /media/key/backup.key'],
  ).requiredOption('-o, --output <file>', 'for the private half');
  keygenCommand.action((flags: { output: string }) =>
    run(keygenCommand, (context) => keygen(flags, context)),
  );

  const restoreCommand = add(program, 'restore', 'takes stopped vTPMs back to what they were in a backup', [
    'vtpmctl restore monday.vtpm --key backup.key web1                     says what would go back',
    'vtpmctl restore monday.vtpm --key backup.key --accept-rollback web1',
  ])
    .argument('<file>', 'made by vtpmctl backup, here')
    .argument('[name...]', 'names or ids (default: all that are in it)')
    .requiredOption('--key <file>', 'private half of the backup key')
    .option('--accept-rollback', 'do it: what was saved since is lost, and each bears a mark for ever');
  restoreCommand.action((file: string, names: string[], flags: RestoreFlags) =>
    run(restoreCommand, (context) => restore(file, names, flags, context)),
  );

  const rebuildCommand = add(
    program,
    'rebuild',
    'makes an installation whose disk is lost again from a backup',
    [
      'vtpmctl rebuild monday.vtpm --key backup.key --accept-rollback',
      'vtpmctl rebuild monday.vtpm --key backup.key --recovery-key-file recovery.key --accept-rollback',
    ],
  )
    .argument('<file>', 'the newest backup of it')
    .requiredOption('--key <file>', 'private half of the backup key')
    .option('--recovery-key-file <file>', 'where the TPM is lost too, or the root key was rotated since')
    .option('--accept-rollback', 'needed: what was saved since is lost');
  rebuildCommand.action((file: string, flags: RebuildFlags) =>
    run(rebuildCommand, (context) => rebuild(file, flags, context)),
  );

  const inspectCommand = add(
    program,
    'inspect',
    'says what is in a backup, a store or a record, without a key',
    ['vtpmctl inspect monday.vtpm', 'vtpmctl inspect /mnt/old-disk/var/lib/vtpm-manager'],
  ).argument('<path>', 'a file, or the directory of a store or an installation');
  inspectCommand.action((path: string) => run(inspectCommand, (context) => inspect(path, context)));
}
