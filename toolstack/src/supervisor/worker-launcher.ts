import type { Socket } from 'node:net';
import type { Logger, Paths } from 'vtpm-common';
import type { VmImages } from '../vm/vm-images.js';
import type { Confinement, Confinements } from './confinement.js';
import type { Entry } from './entry.js';
import type { WorkerImage } from './image.js';
import type { WorkerLedger } from './leftovers.js';
import type { WorkerImages } from './worker-images.js';
import { type WorkerOwner, WorkerProcess } from './worker-process.js';

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

  /**
   * A new worker, without an identity. @param link connected to the manager's worker socket and never read from here; it
   * is closed here in any case. @throws ToolstackError `layer-missing` | `missing-package` | `internal`
   */
  launch(isolation: Entry['isolation'], link: Socket, owner: WorkerOwner): WorkerProcess {
    const images = isolation === 'vm' ? this.#options.vmImages : this.#options.images;
    try {
      const image = images.acquire();
      try {
        const worker = new WorkerProcess({
          confinement: this.#confinement(image, isolation, owner.log),
          image,
          isolation,
          link,
          ledger: this.#options.ledger,
          workerSocket: this.#options.paths.manager.workerSocket,
          owner,
        });
        void worker.ended.then(() => images.release(image));
        return worker;
      } catch (error) {
        images.release(image);
        throw error;
      }
    } finally {
      link.destroy();
    }
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
