import type { Socket } from 'node:net';
import type { Logger, Paths } from 'vtpm-common';
import type { VmImages } from '../vm/vm-images.js';
import type { Confinement, Confinements } from './confinement.js';
import type { Entry } from './entry.js';
import type { InheritedDescriptors } from './handover/descriptors.js';
import type { WorkerHandOver } from './handover/state.js';
import type { WorkerImage } from './image.js';
import type { WorkerLedger } from './leftovers.js';
import { killAndWait } from './processes.js';
import { adoptBody, makeBody } from './worker-body.js';
import type { WorkerImages } from './worker-images.js';
import { type WorkerOptions, type WorkerOwner, WorkerProcess } from './worker-process.js';

export interface WorkerLauncherOptions {
  readonly images: WorkerImages;
  readonly vmImages: VmImages;
  readonly confinements: Confinements;
  readonly ledger: WorkerLedger;
  readonly paths: Paths;
}

/** The one place where workers come from, whoever they are for. */
export class WorkerLauncher {
  readonly #options: WorkerLauncherOptions;

  constructor(options: WorkerLauncherOptions) {
    this.#options = options;
  }

  /** Of the next worker. */
  get image(): WorkerImage {
    return this.#options.images.current;
  }

  /** @returns the digest of the image that a worker would have now @throws ToolstackError `layer-missing` | `missing-package` | … */
  check(isolation: Entry['isolation']): string {
    this.#options.confinements.checkLayers(isolation);
    const images = this.#imagesOf(isolation);
    const image = images.acquire();
    images.release(image);
    return image.digest;
  }

  /**
   * A new worker, without an identity. @param link connected to the manager's worker socket and never read from here; it
   * is closed here in any case. @throws ToolstackError `layer-missing` | `missing-package` | `internal`
   */
  launch(isolation: Entry['isolation'], link: Socket, owner: WorkerOwner): WorkerProcess {
    const images = this.#imagesOf(isolation);
    try {
      const image = images.acquire();
      try {
        const confinement = this.#confinement(image, isolation, owner.log);
        return this.#watch({ body: makeBody(confinement, link), confinement, image, isolation, owner });
      } catch (error) {
        images.release(image);
        throw error;
      }
    } finally {
      link.destroy();
    }
  }

  /** A worker that the program before this one made. @throws ToolstackError `corrupt` | `internal` */
  adopt(
    isolation: Entry['isolation'],
    before: WorkerHandOver,
    inherited: InheritedDescriptors,
    owner: WorkerOwner,
  ): WorkerProcess {
    const { confinements } = this.#options;
    const images = this.#imagesOf(isolation);
    const image = images.adopt(before.imageDigest);
    const confinement = confinements.adopt(before.confinement);
    let worker: WorkerProcess | undefined;
    try {
      const body = adoptBody(before, inherited);
      worker = this.#watch({ body, confinement, image, isolation, owner, before });
      return worker;
    } finally {
      if (!worker) {
        void killAndWait(before.processes).then(
          () => Promise.all([confinement.release(), images.release(image)]),
          () => undefined,
        );
      }
    }
  }

  #watch(options: Omit<WorkerOptions, 'ledger' | 'workerSocket'>): WorkerProcess {
    const { ledger, paths } = this.#options;
    const worker = new WorkerProcess({ ...options, ledger, workerSocket: paths.manager.workerSocket });
    void worker.ended.then(() => this.#imagesOf(options.isolation).release(options.image));
    return worker;
  }

  #imagesOf(isolation: Entry['isolation']): WorkerImages | VmImages {
    return isolation === 'vm' ? this.#options.vmImages : this.#options.images;
  }

  #confinement({ command }: WorkerImage, isolation: Entry['isolation'], log: Logger): Confinement {
    const { confinements, vmImages } = this.#options;
    switch (isolation) {
      case 'sandbox':
        return confinements.sandbox(command);
      case 'vm':
        return confinements.vm(command, vmImages.accelerator());
      case 'none':
        log.warn('isolation none: the worker runs unconfined, for development only');
        return confinements.bare(command);
    }
  }
}
