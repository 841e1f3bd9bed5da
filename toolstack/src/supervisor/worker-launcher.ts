import type { Socket } from 'node:net';
import type { Logger, Paths } from 'vtpm-common';
import type { Entry } from './entry.js';
import type { WorkerImage } from './image.js';
import type { WorkerLedger } from './leftovers.js';
import { bareCommand, type Command, sandboxCommand } from './sandbox.js';
import type { WorkerImages } from './worker-images.js';
import { type WorkerOwner, WorkerProcess } from './worker-process.js';

export interface WorkerLauncherOptions {
  readonly images: WorkerImages;
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
   * is closed here in any case. @throws ToolstackError `missing-package` | `internal`
   */
  launch(isolation: Entry['isolation'], link: Socket, owner: WorkerOwner): WorkerProcess {
    const { images } = this.#options;
    const image = images.acquire();
    let worker: WorkerProcess | undefined;
    try {
      worker = new WorkerProcess({
        command: commandOf(image, isolation, owner.log),
        image,
        isolation,
        link,
        ledger: this.#options.ledger,
        workerSocket: this.#options.paths.manager.workerSocket,
        owner,
      });
      void worker.ended.then(() => images.release(image));
      return worker;
    } finally {
      link.destroy();
      if (!worker) images.release(image);
    }
  }
}

function commandOf({ command }: WorkerImage, isolation: Entry['isolation'], log: Logger): Command {
  if (isolation !== 'none') return sandboxCommand(command);
  log.warn('isolation none: the worker runs unconfined, for development only');
  return bareCommand(command);
}
