import { readFileSync, readlinkSync } from 'node:fs';

const NAMESPACES = ['user', 'mnt', 'pid', 'net', 'ipc', 'uts', 'cgroup'] as const;
/** proc(5), /proc/pid/status: `Seccomp`. */
const SECCOMP_FILTER = '2';

/**
 * What really confines a process, read from /proc and not from what was asked for: `namespace:<kind>` where it is not
 * ours, `read-only-root`, `no-capabilities`, `no-new-privileges`, `seccomp`. Empty where it is gone.
 */
export function confinementOf(pid: number): string[] {
  const layers: string[] = [];
  for (const kind of NAMESPACES) {
    const theirs = namespaceOf(pid, kind);
    if (theirs !== '' && theirs !== namespaceOf('self', kind)) layers.push(`namespace:${kind}`);
  }
  const root = readText(`/proc/${pid}/mountinfo`)
    .split('\n')
    .map((line) => line.split(' '))
    .find((fields) => fields[4] === '/');
  if (root?.[5]?.split(',').includes('ro')) layers.push('read-only-root');
  const status = new Map(
    readText(`/proc/${pid}/status`)
      .split('\n')
      .map((line) => line.split(':\t') as [string, string]),
  );
  const noCapabilities = ['CapInh', 'CapPrm', 'CapEff', 'CapBnd', 'CapAmb'].every((name) =>
    /^0+$/.test(status.get(name) ?? ''),
  );
  if (noCapabilities) layers.push('no-capabilities');
  if (status.get('NoNewPrivs') === '1') layers.push('no-new-privileges');
  if (status.get('Seccomp') === SECCOMP_FILTER) layers.push('seccomp');
  return layers;
}

/** `system`: the supervisor is root and can have every layer. `user`: what a plain user can have. */
export function isolationProfile(uid = process.getuid?.()): 'system' | 'user' {
  return uid === 0 ? 'system' : 'user';
}

function namespaceOf(pid: number | 'self', kind: string): string {
  try {
    return readlinkSync(`/proc/${pid}/ns/${kind}`);
  } catch {
    return '';
  }
}

function readText(path: string): string {
  try {
    return readFileSync(path, 'utf8');
  } catch {
    return '';
  }
}
