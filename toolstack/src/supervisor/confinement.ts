import { spawnSync } from 'node:child_process';
import { closeSync, openSync, readFileSync } from 'node:fs';
import { CONFIG_KEYS, type Settings, sealedMemory } from 'vtpm-common';
import { seccompFilter } from 'vtpm-common/seccomp/filter';
import { ToolstackError } from '../error.js';
import { withKvm } from '../vm/kvm.js';
import { type VmLayer, vmLayers } from '../vm/layers.js';
import { type Accelerator, withAccelerator } from '../vm/qemu.js';
import { CONTROLLERS, removeGroup, type WorkerGroup, WorkerGroups } from './cgroups.js';
import type { KeptDescriptors } from './handover/descriptors.js';
import type { Inheritance } from './handover/inheritance.js';
import type { ConfinementHandOver, HandOverState } from './handover/state.js';
import { ImageView } from './image-view.js';
import {
  confinementOf,
  isolationProfile,
  type Layer,
  layersOf,
  type Profile,
  parseWaived,
  WAIVABLE,
  type WaivableLayer,
} from './layers.js';
import {
  bareCommand,
  type Command,
  findProgram,
  type ImageCommand,
  type SandboxLayers,
  sandboxCommand,
} from './sandbox.js';
import { parseUidRange, WorkerUids } from './worker-uids.js';

/** How one worker is confined, from before it is started until nothing of it is left. */
export interface Confinement extends HeldConfinement {
  readonly command: Command;
  /** Call it when the command runs, or could not be run. */
  started(): void;
}

/** Of a worker that runs. */
export interface HeldConfinement {
  /**
   * Looks at what is really in force, once the worker has said that it is ready. @param pid of node
   * @returns as `layers` @throws ToolstackError `layer-missing`
   */
  check(pid: number): readonly (Layer | VmLayer)[];
  /** What is in force now, by /proc. */
  layers(pid: number): readonly (Layer | VmLayer)[];
  /** Call it when no process of the worker is left. Never rejects. */
  release(): Promise<void>;
  /** What the next program needs to know of it. */
  handOver(): ConfinementHandOver;
}

export interface ConfinementOptions {
  /** Directory of the images. */
  readonly images: string;
  /** The file that the settings are in, for messages. */
  readonly config: string;
  readonly settings: Pick<Settings, 'waive-layers' | 'worker-uids'>;
  /** What the program before this one hands over. */
  readonly before?: Inheritance;
}

/** What confines the workers of one supervisor. */
export class Confinements {
  readonly profile: Profile;
  /** By the setting `waive-layers`. */
  readonly waived: ReadonlySet<WaivableLayer>;
  /** What this machine cannot give, and why. */
  readonly missing: ReadonlyMap<Layer, string>;
  readonly #options: ConfinementOptions;
  readonly #wanted: readonly Layer[];
  readonly #filter: number | undefined;
  readonly #groups: WorkerGroups | undefined;
  readonly #uids: WorkerUids | undefined;
  readonly #view: ImageView | undefined;

  /**
   * Finds out what the machine can give. No worker of an earlier supervisor runs any more. @param image to try it with
   * @throws ToolstackError `usage` for a setting that cannot be
   */
  static async open(options: ConfinementOptions, image: ImageCommand): Promise<Confinements> {
    const { settings, images, before } = options;
    const uidLock = before?.state.confinements.uidLock ?? null;
    const heldLock = before && uidLock !== null ? before.descriptors.take(uidLock) : undefined;
    const profile = isolationProfile();
    const waived = parseWaived(settings['waive-layers']);
    const range = parseUidRange(settings['worker-uids']);
    const wanted = layersOf(profile, waived);
    const missing = new Map<Layer, string>();
    const attempt = async <T>(
      layers: readonly Layer[],
      make: () => T | Promise<T>,
    ): Promise<T | undefined> => {
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
    const filter = await attempt(['seccomp:start'], () =>
      sealedMemory('vtpm-filter', seccompFilter('start')),
    );
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
    const made = new Confinements(options, { profile, waived, missing, wanted, filter, groups, uids, view });
    if (view) await attempt(['uid'], () => made.#tryUid(image));
    return made;
  }

  private constructor(
    options: ConfinementOptions,
    found: {
      profile: Profile;
      waived: ReadonlySet<WaivableLayer>;
      missing: ReadonlyMap<Layer, string>;
      wanted: readonly Layer[];
      filter: number | undefined;
      groups: WorkerGroups | undefined;
      uids: WorkerUids | undefined;
      view: ImageView | undefined;
    },
  ) {
    this.#options = options;
    this.profile = found.profile;
    this.waived = found.waived;
    this.missing = found.missing;
    this.#wanted = found.wanted;
    this.#filter = found.filter;
    this.#groups = found.groups;
    this.#uids = found.uids;
    this.#view = found.view;
  }

  /** None at all: for development. */
  bare(image: ImageCommand): Confinement {
    return {
      command: bareCommand(image),
      started: () => undefined,
      ...this.#unchecked(),
      release: async () => undefined,
      handOver: () => ({ uid: null, groups: [] }),
    };
  }

  /** Of a worker that the program before this one made. */
  adopt({ uid, groups }: ConfinementHandOver): HeldConfinement {
    if (uid !== null) this.#uids?.adopt(uid);
    return {
      // It was looked at when it became ready.
      ...this.#unchecked(),
      release: async () => {
        if (uid !== null) this.#uids?.give(uid);
        for (const path of groups) await removeGroup(path);
      },
      handOver: () => ({ uid, groups }),
    };
  }

  /** What the next program needs to know, beside what it is told of each worker. */
  handOver(kept: KeptDescriptors): HandOverState['confinements'] {
    const lock = this.#uids?.descriptor;
    return { uidLock: lock === undefined ? null : kept.keep(lock), groups: this.#groups?.made ?? 0 };
  }

  /** For one worker. @throws ToolstackError `layer-missing` | `missing-package` */
  sandbox(image: ImageCommand): Confinement {
    return this.#confine(image, this.#wanted, true);
  }

  /**
   * For one worker's VM and its relay. In the place of the two filters is QEMU's own, which is made for what QEMU does.
   * @throws ToolstackError `layer-missing` | `missing-package`
   */
  vm(image: ImageCommand, accelerator: Accelerator): Confinement {
    const argv = withAccelerator(image.argv, accelerator);
    const wanted = this.#wanted.filter((layer) => layer !== 'seccomp:serve');
    const confinement = this.#confine({ ...image, argv }, wanted, false);
    return accelerator === 'kvm' ? { ...confinement, command: withKvm(confinement.command) } : confinement;
  }

  #confine(image: ImageCommand, wanted: readonly Layer[], isFiltered: boolean): Confinement {
    const missing = [...this.missing].filter(([layer]) => wanted.includes(layer));
    if (missing.length > 0) throw this.#refusal(missing);
    const has = (layer: Layer): boolean => wanted.includes(layer);
    const uid = this.#uids?.take();
    let filter: number | undefined;
    let group: WorkerGroup | undefined;
    const closeFilter = (): void => {
      if (filter !== undefined) closeSync(filter);
      filter = undefined;
    };
    const release = async (): Promise<void> => {
      closeFilter();
      if (uid !== undefined) this.#uids?.give(uid);
      await group?.remove();
    };
    try {
      // Each reader begins at the beginning.
      const isFirst = isFiltered && this.#filter !== undefined;
      filter = isFirst ? openSync(`/proc/self/fd/${this.#filter}`, 'r') : undefined;
      group = this.#groups?.create(CONTROLLERS.filter((name) => has(`cgroup:${name}`)));
      const command = sandboxCommand(image, {
        ...this.#own(uid, image),
        limits: has('limits'),
        groups: group?.paths ?? [],
        ...(filter !== undefined && { filter }),
        filtersItself: !isFiltered || has('seccomp:serve'),
      });
      const paths = group?.paths ?? [];
      return {
        command,
        started: closeFilter,
        check: (pid) => this.#check(pid, wanted),
        layers: (pid) => this.#layers(pid),
        release,
        handOver: () => ({ uid: uid ?? null, groups: [...paths] }),
      };
    } catch (error) {
      void release();
      throw error;
    }
  }

  /** When no worker is left. */
  close(): void {
    this.#view?.close();
    this.#uids?.close();
    if (this.#filter !== undefined) closeSync(this.#filter);
  }

  #layers(pid: number): readonly (Layer | VmLayer)[] {
    return vmLayers(pid, confinementOf(pid, this.waived));
  }

  #unchecked(): Pick<HeldConfinement, 'check' | 'layers'> {
    const layers = (pid: number): readonly (Layer | VmLayer)[] => this.#layers(pid);
    return { check: layers, layers };
  }

  #check(pid: number, wanted: readonly Layer[]): readonly (Layer | VmLayer)[] {
    const inForce = confinementOf(pid, this.waived);
    const absent = wanted.filter((layer) => !inForce.includes(layer));
    if (absent.length > 0) {
      throw this.#refusal(absent.map((layer) => [layer, 'the kernel says that the worker runs without it']));
    }
    return vmLayers(pid, inForce);
  }

  #refusal(missing: readonly (readonly [Layer, string])[]): ToolstackError {
    const said = missing.map(([layer, reason]) => `${layer} (${reason})`).join('; ');
    const waivable = missing
      .map(([layer]) => layer)
      .filter((layer) => (WAIVABLE as readonly string[]).includes(layer));
    const names = [...this.waived, ...waivable].join(',');
    const help =
      waivable.length === missing.length
        ? `; to run without, set waive-layers to ${names} in ${this.#options.config} and start the supervisor again`
        : '; vtpmctl doctor says more';
    return new ToolstackError(
      'layer-missing',
      `this machine does not give the sandbox all of its layers: ${said}${help}`,
    );
  }

  /** Whether another uid gets through to the image and may make a sandbox, which a kernel may keep for root. */
  #tryUid(image: ImageCommand): void {
    const uid = this.#uids?.take();
    try {
      const layers = { ...this.#own(uid, image), limits: false, groups: [], filtersItself: true };
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
      if (uid !== undefined) this.#uids?.give(uid);
    }
  }

  #own(uid: number | undefined, { root }: ImageCommand): Pick<SandboxLayers, 'own'> {
    if (uid === undefined || !this.#view) return {};
    return { own: { uid, view: this.#view.path, root: this.#view.pathOf(root) } };
  }
}

/**
 * What this machine cannot give a worker's sandbox, and why, whatever is waived. Makes and removes all that it tries.
 * @param uids as the setting worker-uids has them
 */
export async function missingLayers(
  uids = String(CONFIG_KEYS['worker-uids'].fallback),
): Promise<ReadonlyMap<Layer, string>> {
  const program = { root: '/', node: '/bin/true', loader: '', libraries: '', argv: [], env: {} };
  const options = { images: '/', config: '', settings: { 'waive-layers': '', 'worker-uids': uids } };
  const tried = await Confinements.open(options, program);
  tried.close();
  return tried.missing;
}

const TRIAL_LIMIT_MS = 20_000;

/** @throws where the kernel has no filters, or there is no table of this machine's system calls */
function expectFilters(): void {
  seccompFilter('start');
  const actions = readFileSync('/proc/sys/kernel/seccomp/actions_avail', 'utf8');
  if (!actions.includes('errno')) throw new Error('this kernel has no seccomp filters');
}
