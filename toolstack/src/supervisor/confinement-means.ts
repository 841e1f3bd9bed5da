import { spawnSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { type Settings, sealedMemory } from 'vtpm-common';
import { seccompFilter } from 'vtpm-common/seccomp/filter';
import { ToolstackError } from '../error.js';
import { WorkerGroups } from './cgroups.js';
import type { Inheritance } from './handover/inheritance.js';
import { ImageView } from './image-view.js';
import {
  isolationProfile,
  type Layer,
  layersOf,
  type Profile,
  parseWaived,
  type WaivableLayer,
} from './layers.js';
import { findProgram, type ImageCommand, type SandboxLayers, sandboxCommand } from './sandbox.js';
import { parseUidRange, WorkerUids } from './worker-uids.js';

export interface ConfinementOptions {
  /** Directory of the images. */
  readonly images: string;
  /** The file that the settings are in, for messages. */
  readonly config: string;
  readonly settings: Pick<Settings, 'waive-layers' | 'worker-uids'>;
  /** What the program before this one hands over. */
  readonly before?: Inheritance;
}

/** What the machine gives to confine workers with. */
export interface Means {
  readonly profile: Profile;
  readonly waived: ReadonlySet<WaivableLayer>;
  /** What it cannot give, and why. */
  readonly missing: ReadonlyMap<Layer, string>;
  readonly wanted: readonly Layer[];
  /** Descriptor of the filter that a sandbox is started with. */
  readonly filter: number | undefined;
  readonly groups: WorkerGroups | undefined;
  readonly uids: WorkerUids | undefined;
  /** Where other users get to the images. */
  readonly view: ImageView | undefined;
}

const TRIAL_LIMIT_MS = 20_000;

/** No worker of an earlier supervisor runs any more. @param image to try it with @throws ToolstackError `usage` for a setting that cannot be */
export async function findMeans(options: ConfinementOptions, image: ImageCommand): Promise<Means> {
  const { settings, images, before } = options;
  const uidLock = before?.state.confinements.uidLock ?? null;
  const heldLock = before && uidLock !== null ? before.descriptors.take(uidLock) : undefined;
  const profile = isolationProfile();
  const waived = parseWaived(settings['waive-layers']);
  const range = parseUidRange(settings['worker-uids']);
  const wanted = layersOf(profile, waived);
  const missing = new Map<Layer, string>();
  const attempt = async <T>(layers: readonly Layer[], make: () => T | Promise<T>): Promise<T | undefined> => {
    const asked = layers.filter((layer) => wanted.includes(layer));
    if (asked.length === 0) return undefined;
    try {
      return await make();
    } catch (caught) {
      const error = ToolstackError.from(caught);
      if (error.code === 'usage') throw error;
      for (const layer of asked) missing.set(layer, (caught as Error).message);
      return undefined;
    }
  };
  await attempt(['seccomp:start', 'seccomp:serve'], expectFilters);
  const filter = await attempt(['seccomp:start'], () => sealedMemory('vtpm-filter', seccompFilter('start')));
  await attempt(['limits'], () => findProgram('prlimit'));
  const groups = await attempt(['cgroup:memory', 'cgroup:pids', 'cgroup:cpu'], () =>
    WorkerGroups.open(before?.state.confinements.groups),
  );
  for (const [controller, reason] of groups?.missing ?? []) {
    const layer = `cgroup:${controller}` as const;
    if (wanted.includes(layer)) missing.set(layer, reason);
  }
  const uids = await attempt(['uid'], () => new WorkerUids(range, { held: heldLock }));
  const view = uids && (await attempt(['uid'], () => ImageView.open(images)));
  if (uids && view) await attempt(['uid'], () => tryUid({ uids, view }, image));
  return { profile, waived, missing, wanted, filter, groups, uids, view };
}

/** What a sandbox has of its own where workers have a uid each. */
export function ownSandbox(
  { view }: Pick<Means, 'view'>,
  uid: number | undefined,
  { root }: ImageCommand,
): Pick<SandboxLayers, 'own'> {
  if (uid === undefined || !view) return {};
  return { own: { uid, view: view.path, root: view.pathOf(root) } };
}

/** Whether another uid gets through to the image and may make a sandbox, which a kernel may keep for root. */
function tryUid(
  { uids, view }: { readonly uids: WorkerUids; readonly view: ImageView },
  image: ImageCommand,
): void {
  const uid = uids.take();
  try {
    const layers = { ...ownSandbox({ view }, uid, image), limits: false, groups: [], filtersItself: true };
    const { file, args } = sandboxCommand({ ...image, argv: ['--version'] }, layers);
    const { status, stderr, error } = spawnSync(file, args, {
      env: {},
      encoding: 'utf8',
      timeout: TRIAL_LIMIT_MS,
    });
    if (status === 0) return;
    throw new ToolstackError(
      'layer-missing',
      error?.message ?? stderr.trim().split('\n')[0] ?? `exit status ${status}`,
    );
  } finally {
    if (uid !== undefined) uids.give(uid);
  }
}

/** @throws where the kernel has no filters, or there is no table of this machine's system calls */
function expectFilters(): void {
  seccompFilter('start');
  const actions = readFileSync('/proc/sys/kernel/seccomp/actions_avail', 'utf8');
  if (!actions.includes('errno')) throw new Error('this kernel has no seccomp filters');
}
