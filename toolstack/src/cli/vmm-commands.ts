import { type Command, Option } from 'commander';
import type { Add, Run } from './command-line.js';
import { type DropinFlags, dropin } from './commands/dropin.js';
import { libvirtXml, qemuArgs, type VmmFlags } from './commands/vmm.js';

/** What gives a vTPM to a virtual machine monitor. */
export function addVmmCommands(program: Command, add: Add, run: Run): void {
  const qemuCommand = add(program, 'qemu-args', 'shows the arguments that give a vTPM to QEMU', [
    'qemu-system-x86_64 -M q35 $(vtpmctl qemu-args web1) …',
    'vtpmctl qemu-args web1 --model tpm-tis',
  ])
    .argument('<name>', 'name or id')
    .addOption(
      new Option('--model <model>', 'of the device that the guest sees')
        .choices(['tpm-crb', 'tpm-tis', 'tpm-tis-device', 'tpm-spapr'])
        .default('tpm-crb'),
    );
  qemuCommand.action((name: string, flags: VmmFlags) =>
    run(qemuCommand, (context) => qemuArgs(name, flags, context)),
  );

  const libvirtCommand = add(
    program,
    'libvirt-xml',
    'shows the element that gives a vTPM to a domain of libvirt 9.0 or newer',
    ['vtpmctl libvirt-xml web1        goes below <devices>: virsh edit DOMAIN'],
  )
    .argument('<name>', 'name or id')
    .addOption(
      new Option('--model <model>', 'of the device that the guest sees')
        .choices(['tpm-crb', 'tpm-tis', 'tpm-spapr'])
        .default('tpm-crb'),
    );
  libvirtCommand.action((name: string, flags: VmmFlags) =>
    run(libvirtCommand, (context) => libvirtXml(name, flags, context)),
  );

  const dropinCommand = add(
    program,
    'dropin',
    'lets the drop-in command swtpm start a vTPM, by a token in a directory',
    [
      'vtpmctl dropin web1 /var/lib/libvirt/swtpm/0b8f7a52-3c1d-4f0e-9a6b-2f3c4d5e6f70/tpm2 --user swtpm',
      'vtpmctl dropin web1 --remove',
    ],
  )
    .argument('<name>', 'name or id')
    .argument('[directory]', 'that swtpm is given with --tpmstate; file://FILE for a file')
    .option('--user <user>', 'who runs swtpm (default: you)')
    .option('--remove', 'vtpmctl start starts it again, and swtpm no longer');
  dropinCommand.action((name: string, directory: string | undefined, flags: DropinFlags) =>
    run(dropinCommand, (context) => dropin(name, directory, flags, context)),
  );
}
