import { accessSync, constants, readFileSync } from 'node:fs';
import { ToolstackError } from '../error.js';
import { KVM } from './kvm.js';
import type { Accelerator } from './qemu.js';

/**
 * What `auto` means on this host: KVM where its device can be opened and the processor says that it can run VMs. There
 * are hosts that have the device alone, and on those no VM gets far.
 * @throws ToolstackError `missing-package` where KVM was asked for and is not there
 */
export function chooseAccelerator(setting: 'auto' | Accelerator, device = KVM): Accelerator {
  if (setting === 'tcg') return 'tcg';
  const refusal = whyNotOpened(device);
  if (setting === 'kvm' && refusal) {
    throw new ToolstackError(
      'missing-package',
      // EPERM is the device policy of a cgroup: root has no other.
      `vm-accelerator is kvm, and the device cannot be opened: ${refusal}; load the kernel's KVM module, have the service of the supervisor say DeviceAllow=${device} rw where it has a DevicePolicy (EPERM), or set vm-accelerator to tcg`,
    );
  }
  return setting === 'kvm' || (!refusal && runsVms(cpuInfo())) ? 'kvm' : 'tcg';
}

/** @param cpuInfo text of /proc/cpuinfo */
export function runsVms(cpuInfo: string): boolean {
  return /^flags\s*:.*\b(vmx|svm)\b/m.test(cpuInfo);
}

function cpuInfo(): string {
  try {
    return readFileSync('/proc/cpuinfo', 'utf8');
  } catch {
    return '';
  }
}

function whyNotOpened(device: string): string | undefined {
  try {
    accessSync(device, constants.R_OK | constants.W_OK);
    return undefined;
  } catch (error) {
    return (error as NodeJS.ErrnoException).message;
  }
}
