import { readdirSync, readFileSync, readlinkSync } from 'node:fs';
import type { Layer } from '../supervisor/layers.js';
import { VM_PARTS } from './qemu.js';

/** `seccomp:qemu`: the filter that QEMU installs itself. */
export type VmLayer = 'vm:kvm' | 'vm:tcg' | 'seccomp:qemu';

/** The layers of a process, with those of a VM where it runs one, as /proc shows it. @param layers of the sandbox around it */
export function vmLayers(pid: number, layers: readonly Layer[]): (Layer | VmLayer)[] {
  try {
    const [program] = readFileSync(`/proc/${pid}/cmdline`, 'latin1').split('\0');
    if (program !== VM_PARTS.qemu) return [...layers];
    const usesKvm = readdirSync(`/proc/${pid}/fd`).some((fd) => isKvm(`/proc/${pid}/fd/${fd}`));
    const named = layers.map((layer) => (layer === 'seccomp:start' ? 'seccomp:qemu' : layer));
    return [...named, usesKvm ? 'vm:kvm' : 'vm:tcg'];
  } catch {
    return [...layers];
  }
}

function isKvm(link: string): boolean {
  try {
    return readlinkSync(link) === 'anon_inode:kvm-vm';
  } catch {
    return false;
  }
}
