import { readFileSync } from 'node:fs';

/** A file of the kernel, of proc(5) or a cgroup; empty where it cannot be read: its process or group is gone. */
export function readKernelFile(path: string): string {
  try {
    return readFileSync(path, 'utf8');
  } catch {
    return '';
  }
}
