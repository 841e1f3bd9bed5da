import type { Command } from 'commander';
import type { Add, Run } from './command-line.js';
import { type EvacuateFlags, evacuate } from './commands/evacuate.js';
import { type MigrateFlags, migrate } from './commands/migrate.js';
import { migrateCancel, migrateResolve, migrateStatus, type ResolveFlags } from './commands/migrations.js';
import { type FenceFlags, fence, type RescueFlags, rescue } from './commands/rescue.js';

/** `migrate` with its own commands, and `evacuate`. */
export function addMigrateCommands(program: Command, add: Add, run: Run): void {
  const migrateCommand = add(program, 'migrate', 'moves a vTPM to another host, while it runs or stopped', [
    'vtpmctl migrate web1 --to hostb',
    'vtpmctl migrate web1 --to hostb --dry-run      checks everything, stops nothing',
    'vtpmctl migrate status                         what is under way, or in doubt',
    'vtpmctl migrate resolve web1                   asks the other host what it decided',
  ])
    .argument('[name]', 'name or id; a vTPM that is named like one of the commands below: its id')
    .option('--to <peer>', 'needed: where to, as vtpmctl peer list has it')
    .option('--dry-run', 'check everything and stop nothing')
    .option('--offline', 'only where it is stopped')
    .option('--live', 'only where it runs; a VMM that is connected is not waited for')
    .option('--timeout <seconds>', 'cancel where it is not done by then and can still be cancelled');
  migrateCommand.action((name: string | undefined, flags: MigrateFlags) =>
    run(migrateCommand, (context) => migrate(name, flags, context)),
  );

  const statusCommand = add(
    migrateCommand,
    'status',
    'shows migrations that are under way, in doubt or over',
    ['vtpmctl migrate status', 'vtpmctl migrate status web1 --json'],
  ).argument('[name]', 'name or id');
  statusCommand.action((name: string | undefined) =>
    run(statusCommand, (context) => migrateStatus(name, context)),
  );

  const resolveCommand = add(
    migrateCommand,
    'resolve',
    'asks the other host now what it decided; never makes a second one run',
    [
      'vtpmctl migrate resolve web1',
      'vtpmctl migrate resolve web1 --fenced web1.fencing      that host is gone for good',
    ],
  )
    .argument('<name>', 'name or id')
    .option(
      '--fenced <file>',
      'what vtpmctl migrate fence wrote about the destination: the vTPM goes on here',
    );
  resolveCommand.action((name: string, flags: ResolveFlags) =>
    run(resolveCommand, (context) => migrateResolve(name, flags, context)),
  );

  const cancelCommand = add(
    migrateCommand,
    'cancel',
    'cancels a migration whose state is not on its way yet',
    ['vtpmctl migrate cancel web1'],
  ).argument('<name>', 'name or id');
  cancelCommand.action((name: string) => run(cancelCommand, (context) => migrateCancel(name, context)));

  const fenceCommand = add(
    migrateCommand,
    'fence',
    'signs your word that a dead host does not run a vTPM and will not; a rescue needs it',
    [
      "vtpmctl migrate fence --vtpm 0b8f7a52-3c1d-4f0e-9a6b-2f3c4d5e6f70 --host hosta --last-generation 41 --method 'power cut at the PDU, cable 7 pulled' > web1.fencing",
    ],
  )
    .requiredOption('--vtpm <id>', 'its id')
    .requiredOption('--host <peer>', 'the dead host: name of a peer, or host id of 64 hex digits')
    .requiredOption('--last-generation <number>', 'the newest that is known; at least that of the backup')
    .requiredOption('--method <text>', 'what keeps that host from running it; goes into the audit log');
  fenceCommand.action((flags: FenceFlags) => run(fenceCommand, (context) => fence(flags, context)));

  const rescueCommand = add(
    migrateCommand,
    'rescue',
    'has a vTPM go on here whose host is dead, from a backup which that host made',
    [
      'vtpmctl migrate rescue web1 --from-backup monday.vtpm --operator-key backup.key --fencing web1.fencing',
      'vtpmctl migrate rescue web1 --from-backup … --operator-key … --fencing … --accept-rollback',
    ],
  )
    .argument('<name>', 'what it is called here')
    .option('--from-backup <file>', 'needed: made by the dead host, which is a peer of this one')
    .option('--operator-key <file>', 'needed: private half of the backup key')
    .option('--fencing <file>', 'needed: what vtpmctl migrate fence wrote')
    .option('--accept-rollback', 'do it: what was saved since is lost, and it bears a mark for ever');
  rescueCommand.action((name: string, flags: RescueFlags) =>
    run(rescueCommand, (context) => rescue(name, flags, context)),
  );

  const evacuateCommand = add(program, 'evacuate', 'moves all vTPMs of this host to another one', [
    'vtpmctl evacuate --to hostb',
    "vtpmctl evacuate --to hostb --only 'web*' 'db?' --parallel 8",
    'vtpmctl evacuate --to hostb --dry-run',
  ])
    .requiredOption('--to <peer>', 'where to, as vtpmctl peer list has it')
    .option('--parallel <count>', 'at a time', '4')
    .option('--only <glob...>', 'those whose names fit one of these: * is any characters, ? is one')
    .option('--dry-run', 'check everything and stop nothing');
  evacuateCommand.action((flags: EvacuateFlags) =>
    run(evacuateCommand, (context) => evacuate(flags, context)),
  );
}
