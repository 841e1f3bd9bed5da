import { statSync } from 'node:fs';
import { join } from 'node:path';
import type { Logger } from 'vtpm-common';
import { installedDigest, type WorkerImage } from '../supervisor/image.js';
import { collectSources } from '../supervisor/image-sources.js';
import { WorkerImages } from '../supervisor/worker-images.js';
import { chooseAccelerator } from './accelerator.js';
import type { Accelerator } from './qemu.js';
import { BUILD_COMMAND, bundledManifest, collectVmSources, readVmManifest } from './sources.js';

export interface VmImagesOptions {
  /** What `image build-vm` made. */
  readonly built: string;
  /** Of the measured copies. */
  readonly directory: string;
  readonly accelerator: 'auto' | Accelerator;
  readonly log: Logger;
}

/** The image that workers in VMs are started from. It is looked at when the first one starts: most hosts have none. */
export class VmImages {
  readonly #options: VmImagesOptions;
  #images: WorkerImages | undefined;
  #builtAt: string | undefined;
  /** Digests of what workers of the program before this one run from, as long as nothing else is known of images. */
  #adopted: string[] = [];

  constructor(options: VmImagesOptions) {
    this.#options = options;
  }

  /** As WorkerImages does, and makes a new image where one was built. @throws as `collectVmSources` */
  acquire(): WorkerImage {
    const { built, directory, log } = this.#options;
    const builtAt = stampOf(join(built, 'vm.json'));
    if (!this.#images) {
      this.#images = new WorkerImages({
        sources: () => collectVmSources(built),
        directory,
        log,
        inUse: this.#adopted,
      });
      for (const digest of this.#adopted.splice(0)) this.#images.adopt(digest);
      this.#warnOfAge();
    } else if (builtAt !== this.#builtAt) {
      this.#images.refresh();
      this.#warnOfAge();
    }
    this.#builtAt = builtAt;
    return this.#images.acquire();
  }

  /** The image that a worker runs from already; `release` it likewise. */
  adopt(digest: string): Pick<WorkerImage, 'digest'> {
    if (this.#images) return this.#images.adopt(digest);
    this.#adopted.push(digest);
    return { digest };
  }

  release(image: Pick<WorkerImage, 'digest'>): void {
    if (this.#images) this.#images.release(image);
    else this.#adopted.splice(this.#adopted.indexOf(image.digest), 1);
  }

  /** @throws ToolstackError `missing-package` */
  accelerator(): Accelerator {
    return chooseAccelerator(this.#options.accelerator);
  }

  #warnOfAge(): void {
    const { built, log } = this.#options;
    const { guestDigest } = readVmManifest(built);
    if (installedDigest(collectSources(bundledManifest('vm-guest.json'))) === guestDigest) return;
    log.warn(
      { built },
      `workers in VMs run other files than those installed now, which may mend something; to follow: ${BUILD_COMMAND}`,
    );
  }
}

function stampOf(path: string): string | undefined {
  const found = statSync(path, { bigint: true, throwIfNoEntry: false });
  return found && `${found.dev}:${found.ino}:${found.ctimeNs}`;
}
