import { type Command, Option } from 'commander';
import { DEFAULT_DOORS, DOOR_KINDS } from '../supervisor/door-kinds.js';
import type { Add, Run } from './command-line.js';
import { type CreateFlags, create } from './commands/create.js';
import { exec } from './commands/exec.js';
import { remove, start, stop } from './commands/lifecycle.js';
import { list, show } from './commands/list.js';
import { type SetFlags, set } from './commands/set.js';

/** The life of a vTPM on this host. */
export function addVtpmCommands(program: Command, add: Add, run: Run): void {
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
