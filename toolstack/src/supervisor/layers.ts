import { readlinkSync } from 'node:fs';
import { ToolstackError } from '../error.js';
import { limitedBy } from './cgroups.js';
import { readKernelFile } from './kernel-file.js';
import { LIMITS } from './limits.js';

const NAMESPACES = ['user', 'mnt', 'pid', 'net', 'ipc', 'uts', 'cgroup'] as const;

/** What bubblewrap makes. Without one of these there is no sandbox, so none can be waived. */
const ALWAYS = [
  ...NAMESPACES.map((kind) => `namespace:${kind}` as const),
  'read-only-root',
  'no-capabilities',
  'no-new-privileges',
] as const;

/** What may be waived by name, with the setting `waive-layers`, where a machine cannot give it. */
export const WAIVABLE = [
  'seccomp:start',
  'seccomp:serve',
  'limits',
  'uid',
  'cgroup:memory',
  'cgroup:pids',
  'cgroup:cpu',
] as const;

export type WaivableLayer = (typeof WAIVABLE)[number];
export type Layer = (typeof ALWAYS)[number] | WaivableLayer;

/** `system`: the supervisor is root and can have every layer. `user`: what a plain user can have. */
export type Profile = 'system' | 'user';

const ONLY_ROOT: ReadonlySet<Layer> = new Set(['uid', 'cgroup:memory', 'cgroup:pids', 'cgroup:cpu']);

export function isolationProfile(uid = process.getuid?.()): Profile {
  return uid === 0 ? 'system' : 'user';
}

/** What a worker in the sandbox must have. */
export function layersOf(profile: Profile, waived: ReadonlySet<WaivableLayer>): Layer[] {
  return [...ALWAYS, ...WAIVABLE].filter(
    (layer) => (profile === 'system' || !ONLY_ROOT.has(layer)) && !(waived as ReadonlySet<Layer>).has(layer),
  );
}

/** @param text names with commas between them, as `waive-layers` has them. @throws ToolstackError `usage` */
export function parseWaived(text: string): ReadonlySet<WaivableLayer> {
  const names = text
    .split(',')
    .map((name) => name.trim())
    .filter(Boolean);
  const isWaivable = (name: string): name is WaivableLayer => (WAIVABLE as readonly string[]).includes(name);
  for (const name of names) {
    if (!isWaivable(name)) {
      throw new ToolstackError('usage', `waive-layers: "${name}" is none of ${WAIVABLE.join(', ')}`);
    }
  }
  return new Set(names.filter(isWaivable));
}

/**
 * What really confines a process, read from /proc and not from what was asked for. Empty where it is gone.
 * @param waived says which of the two filters a single one is: the kernel gives their number, not their content
 */
export function confinementOf(pid: number, waived: ReadonlySet<WaivableLayer> = new Set()): Layer[] {
  own ??= ownConfinement();
  const layers: Layer[] = [];
  for (const kind of NAMESPACES) {
    const theirs = namespaceOf(pid, kind);
    if (theirs !== '' && theirs !== own.namespaces[kind]) layers.push(`namespace:${kind}`);
  }
  const root = readKernelFile(`/proc/${pid}/mountinfo`)
    .split('\n')
    .map((line) => line.split(' '))
    .find((fields) => fields[4] === '/');
  if (root?.[5]?.split(',').includes('ro')) layers.push('read-only-root');
  const status = statusOf(pid);
  const noCapabilities = ['CapInh', 'CapPrm', 'CapEff', 'CapBnd', 'CapAmb'].every((name) =>
    /^0+$/.test(status.get(name) ?? ''),
  );
  if (noCapabilities) layers.push('no-capabilities');
  if (status.get('NoNewPrivs') === '1') layers.push('no-new-privileges');
  // A container's filter is on the supervisor, too.
  const filters = filtersOf(status) - own.filters;
  layers.push(
    ...(['seccomp:start', 'seccomp:serve'] as const).filter((name) => !waived.has(name)).slice(0, filters),
  );
  if (hasLimits(pid)) layers.push('limits');
  // Real, effective, saved and of the file system.
  const uids = new Set(status.get('Uid')?.split('\t'));
  const [uid] = uids;
  if (uids.size === 1 && uid !== '0' && uid !== String(process.getuid?.())) layers.push('uid');
  layers.push(...limitedBy(pid).map((controller) => `cgroup:${controller}` as const));
  return layers;
}

/** Of the supervisor itself. Asked once: what it is in, it stays in. */
let own: ReturnType<typeof ownConfinement> | undefined;

function ownConfinement() {
  const namespaces: Partial<Record<(typeof NAMESPACES)[number], string>> = {};
  for (const kind of NAMESPACES) namespaces[kind] = namespaceOf('self', kind);
  return { namespaces, filters: filtersOf(statusOf('self')) };
}

/** proc(5), /proc/pid/status: `Seccomp_filters`, since Linux 5.9; before, `Seccomp` is 2 with one filter and with several. */
function filtersOf(status: ReadonlyMap<string, string>): number {
  const count = Number(status.get('Seccomp_filters') ?? Number.NaN);
  return Number.isNaN(count) ? (status.get('Seccomp') === '2' ? 1 : 0) : count;
}

function hasLimits(pid: number): boolean {
  const hard = new Map(
    readKernelFile(`/proc/${pid}/limits`)
      .split('\n')
      .map((line) => line.split(/ {2,}/))
      .map(([row = '', , value = '']) => [row, value]),
  );
  return LIMITS.resources.every(({ row, value }) => Number(hard.get(row) ?? Number.NaN) <= value);
}

function statusOf(pid: number | 'self'): ReadonlyMap<string, string> {
  return new Map(
    readKernelFile(`/proc/${pid}/status`)
      .split('\n')
      .map((line) => line.split(/:\t(.*)/s) as [string, string]),
  );
}

function namespaceOf(pid: number | 'self', kind: string): string {
  try {
    return readlinkSync(`/proc/${pid}/ns/${kind}`);
  } catch {
    return '';
  }
}
