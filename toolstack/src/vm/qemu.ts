/** What runs the VM's instructions: the processor, or QEMU itself, which is slow and needs nothing. */
export type Accelerator = 'kvm' | 'tcg';

/** Where the parts of a VM are inside of the image that its relay runs from. */
export const VM_PARTS = {
  qemu: '/usr/bin/qemu-system-x86_64',
  /** QEMU's modules: where Debian's QEMU looks for them. */
  modules: '/usr/lib/x86_64-linux-gnu/qemu',
  firmware: '/vm/firmware',
  kernel: '/vm/kernel',
  initramfs: '/vm/initramfs',
  root: '/vm/root',
} as const;

/** Of QEMU: its end of the socket pair to the relay (vtpmd's vm-relay-main.ts). */
const PORT_DESCRIPTOR = 3;

/** In the template: what runs the VM. */
const ACCELERATOR = '{accelerator}';
const ACCELERATORS: Readonly<Record<Accelerator, string>> = {
  kvm: 'kvm',
  // MiB of translated code; by default it would be a part of the host's memory.
  tcg: 'tcg,tb-size=32',
};

const MEMORY_MIB = 128;

const KERNEL_COMMAND_LINE = [
  'console=ttyS0',
  'quiet',
  'loglevel=3',
  // Whatever goes wrong ends the VM, and QEMU with it.
  'panic=-1',
  'oops=panic',
  'panic_on_oom=1',
].join(' ');

/**
 * QEMU and its arguments; part of the image's digest. One virtual processor, a console for the log, the root read-only, one port, and the host's random
 * numbers: no network, no USB, no display, no monitor, nothing that the machine would add by itself.
 */
export const QEMU_TEMPLATE: readonly string[] = [
  VM_PARTS.qemu,
  ...['-nodefaults', '-no-user-config', '-no-reboot'],
  ...['-sandbox', 'on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny'],
  ...['-display', 'none', '-monitor', 'none'],
  ...['-machine', 'q35,usb=off,sata=off,smbus=off,vmport=off', '-accel', ACCELERATOR],
  ...['-cpu', 'max', '-smp', '1', '-m', `${MEMORY_MIB}M`],
  ...['-L', VM_PARTS.firmware],
  ...['-kernel', VM_PARTS.kernel, '-initrd', VM_PARTS.initramfs, '-append', KERNEL_COMMAND_LINE],
  ...['-chardev', 'stdio,id=console,signal=off', '-serial', 'chardev:console'],
  ...['-drive', `if=none,id=root,format=raw,readonly=on,file=${VM_PARTS.root}`],
  ...['-device', 'virtio-blk-pci,drive=root'],
  ...['-object', 'rng-random,id=random,filename=/dev/urandom', '-device', 'virtio-rng-pci,rng=random'],
  ...['-chardev', `socket,id=port,fd=${PORT_DESCRIPTOR}`, '-device', 'virtio-serial-pci,max_ports=2'],
  ...['-device', 'virtserialport,chardev=port,nr=1'],
];

/** @param argv that ends with QEMU_TEMPLATE */
export function withAccelerator(argv: readonly string[], accelerator: Accelerator): string[] {
  return argv.map((argument) => (argument === ACCELERATOR ? ACCELERATORS[accelerator] : argument));
}
