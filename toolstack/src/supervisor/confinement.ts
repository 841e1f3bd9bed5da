import { closeSync, openSync } from 'node:fs';
import { CONFIG_KEYS } from 'vtpm-common';
import { ToolstackError } from '../error.js';
import { withKvm } from '../vm/kvm.js';
import { type VmLayer, vmLayers } from '../vm/layers.js';
import { type Accelerator, withAccelerator } from '../vm/qemu.js';
import { CONTROLLERS, removeGroup, type WorkerGroup } from './cgroups.js';
import { type ConfinementOptions, findMeans, type Means, ownSandbox } from './confinement-means.js';
import type { Entry } from './entry.js';
import type { KeptDescriptors } from './handover/descriptors.js';
import type { ConfinementHandOver, HandOverState } from './handover/state.js';
import { confinementOf, type Layer, type Profile, WAIVABLE, type WaivableLayer } from './layers.js';
import { bareCommand, type Command, type ImageCommand, sandboxCommand } from './sandbox.js';

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

/** What confines the workers of one supervisor. */
export class Confinements {
  readonly #options: ConfinementOptions;
  readonly #means: Means;

  /**
   * Finds out what the machine can give. No worker of an earlier supervisor runs any more. @param image to try it with
   * @throws ToolstackError `usage` for a setting that cannot be
   */
  static async open(options: ConfinementOptions, image: ImageCommand): Promise<Confinements> {
    return new Confinements(options, await findMeans(options, image));
  }

  private constructor(options: ConfinementOptions, means: Means) {
    this.#options = options;
    this.#means = means;
  }

  get profile(): Profile {
    return this.#means.profile;
  }

  /** By the setting `waive-layers`. */
  get waived(): ReadonlySet<WaivableLayer> {
    return this.#means.waived;
  }

  /** What this machine cannot give, and why. */
  get missing(): ReadonlyMap<Layer, string> {
    return this.#means.missing;
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
    if (uid !== null) this.#means.uids?.adopt(uid);
    return {
      // It was looked at when it became ready.
      ...this.#unchecked(),
      release: async () => {
        if (uid !== null) this.#means.uids?.give(uid);
        for (const path of groups) await removeGroup(path);
      },
      handOver: () => ({ uid, groups }),
    };
  }

  /** What the next program needs to know, beside what it is told of each worker. */
  handOver(kept: KeptDescriptors): HandOverState['confinements'] {
    const lock = this.#means.uids?.descriptor;
    return { uidLock: lock === undefined ? null : kept.keep(lock), groups: this.#means.groups?.made ?? 0 };
  }

  /** @throws ToolstackError `layer-missing` where no worker could be started in it */
  checkLayers(isolation: Entry['isolation']): void {
    const wanted = this.#wanted(isolation);
    const missing = [...this.missing].filter(([layer]) => wanted.includes(layer));
    if (missing.length > 0) throw this.#refusal(missing);
  }

  /** For one worker. @throws ToolstackError `layer-missing` | `missing-package` */
  sandbox(image: ImageCommand): Confinement {
    return this.#confine(image, 'sandbox');
  }

  /**
   * For one worker's VM and its relay. In the place of the two filters is QEMU's own, which is made for what QEMU does.
   * @throws ToolstackError `layer-missing` | `missing-package`
   */
  vm(image: ImageCommand, accelerator: Accelerator): Confinement {
    const argv = withAccelerator(image.argv, accelerator);
    const confinement = this.#confine({ ...image, argv }, 'vm');
    return accelerator === 'kvm' ? { ...confinement, command: withKvm(confinement.command) } : confinement;
  }

  #wanted(isolation: Entry['isolation']): readonly Layer[] {
    const { wanted } = this.#means;
    switch (isolation) {
      case 'sandbox':
        return wanted;
      case 'vm':
        return wanted.filter((layer) => layer !== 'seccomp:serve');
      case 'none':
        return [];
    }
  }

  #confine(image: ImageCommand, isolation: 'sandbox' | 'vm'): Confinement {
    this.checkLayers(isolation);
    const wanted = this.#wanted(isolation);
    const isFiltered = isolation === 'sandbox';
    const has = (layer: Layer): boolean => wanted.includes(layer);
    const uid = this.#means.uids?.take();
    let filter: number | undefined;
    let group: WorkerGroup | undefined;
    const closeFilter = (): void => {
      if (filter !== undefined) closeSync(filter);
      filter = undefined;
    };
    const release = async (): Promise<void> => {
      closeFilter();
      if (uid !== undefined) this.#means.uids?.give(uid);
      await group?.remove();
    };
    try {
      // Each reader begins at the beginning.
      const isFirst = isFiltered && this.#means.filter !== undefined;
      filter = isFirst ? openSync(`/proc/self/fd/${this.#means.filter}`, 'r') : undefined;
      group = this.#means.groups?.create(CONTROLLERS.filter((name) => has(`cgroup:${name}`)));
      const command = sandboxCommand(image, {
        ...ownSandbox(this.#means, uid, image),
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
    this.#means.view?.close();
    this.#means.uids?.close();
    if (this.#means.filter !== undefined) closeSync(this.#means.filter);
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
