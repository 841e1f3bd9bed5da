import { accessSync, constants, readFileSync } from 'node:fs';
import { ToolstackError } from '../error.js';
import { KVM } from './kvm.js';
import type { Accelerator } from './qemu.js';

/**
 * What `auto` means on this host: KVM where its device can be opened and the processor says that it can run VMs. There
 * are hosts that have the device alone, and on those no VM gets far.
 * @throws ToolstackError `missing-package` where KVM was asked for and is not there
 */
export function chooseAccelerator(setting: 'auto' | Accelerator): Accelerator {
  if (setting === 'tcg') return 'tcg';
  const canOpen = isAccessible();
  if (setting === 'kvm' && !canOpen) {
    throw new ToolstackError(
      'missing-package',
      `vm-accelerator is kvm, and ${KVM} cannot be opened; load the kernel's KVM module, or set vm-accelerator to tcg`,
    );
  }
  return setting === 'kvm' || (canOpen && runsVms(cpuInfo())) ? 'kvm' : 'tcg';
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

function isAccessible(): boolean {
  try {
    accessSync(KVM, constants.R_OK | constants.W_OK);
    return true;
  } catch {
    return false;
  }
}
