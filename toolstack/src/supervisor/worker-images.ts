import { rmSync, statSync } from 'node:fs';
import { join } from 'node:path';
import type { Logger } from 'vtpm-common';
import { ToolstackError } from '../error.js';
import { measureAgain, prepareImage, type WorkerImage } from './image.js';
import type { ImageSources } from './image-sources.js';
import { changedSince, identityIn } from './image-tree.js';

export interface WorkerImagesOptions {
  /** Looks at what is installed now. */
  readonly sources: () => ImageSources;
  readonly directory: string;
  readonly log: Logger;
  /** Digests of the copies that workers of the program before this one run from. */
  readonly inUse?: readonly string[];
}

/**
 * The image that workers are started from, and those from which workers still run: an upgrade of a package makes a new
 * one beside them.
 */
export class WorkerImages {
  readonly #options: WorkerImagesOptions;
  readonly #users = new Map<string, number>();
  #current: WorkerImage;

  /** Removes all copies that nobody uses. @throws as `collectSources` */
  constructor(options: WorkerImagesOptions) {
    this.#options = options;
    this.#current = prepareImage(options.sources(), options.directory, new Set(options.inUse));
  }

  get current(): WorkerImage {
    return this.#current;
  }

  /** The image for a new worker; `release` it when the worker has ended. A copy that was touched is measured again first. */
  acquire(): WorkerImage {
    const changed = changedSince(this.#current.command.root, this.#current.stamps);
    if (changed !== undefined) {
      this.#options.log.warn(
        { path: join(this.#current.command.root, changed) },
        'the copy of the worker was touched since it was measured; it is measured again',
      );
      const again = measureAgain(this.#current);
      if (again) this.#current = again;
      else this.refresh(this.#current.digest);
    }
    this.adopt(this.#current.digest);
    return this.#current;
  }

  /** The image that a worker runs from already; `release` it likewise. */
  adopt(digest: string): Pick<WorkerImage, 'digest'> {
    this.#users.set(digest, (this.#users.get(digest) ?? 0) + 1);
    return { digest };
  }

  release({ digest }: Pick<WorkerImage, 'digest'>): void {
    const left = (this.#users.get(digest) ?? 1) - 1;
    if (left > 0) {
      this.#users.set(digest, left);
      return;
    }
    this.#users.delete(digest);
    if (digest !== this.#current.digest) this.#remove(digest);
  }

  /**
   * Makes what is installed now the image for workers to come. Those that run keep theirs.
   * @param expected refuses any other digest and stays with what it has
   * @throws ToolstackError `image-not-allowed`, and as `collectSources`
   */
  refresh(expected?: string): WorkerImage {
    const { directory, log, sources } = this.#options;
    const keep = new Set([this.#current.digest, ...this.#users.keys()]);
    const prepared = prepareImage(sources(), directory, keep);
    if (expected !== undefined && prepared.digest !== expected) {
      if (!keep.has(prepared.digest)) this.#remove(prepared.digest);
      throw new ToolstackError(
        'image-not-allowed',
        `what is installed makes the image ${prepared.digest}, not ${expected}; where the package of this supervisor was upgraded, restart it, otherwise: vtpmctl image allow`,
      );
    }
    const before = this.#current.digest;
    this.#current = prepared;
    if (before !== prepared.digest) {
      log.info({ before, imageDigest: prepared.digest }, 'workers start from a new image from now on');
      if (!this.#users.has(before)) this.#remove(before);
    }
    return prepared;
  }

  #remove(digest: string): void {
    try {
      rmSync(join(this.#options.directory, digest), { recursive: true, force: true });
    } catch (error) {
      // The next start of the supervisor removes it.
      this.#options.log.warn({ digest, reason: (error as Error).message }, 'an old image is still there');
    }
  }
}

/**
 * Between the measurement and now nobody has changed what the worker executes; before its start alone this could not
 * be said. Ask when it runs and has no identity yet.
 * @param root of the worker's process, for example `/proc/4711/root`; undefined where it shares the host's
 * @throws ToolstackError `image-changed`
 */
export function checkUntouched(image: WorkerImage, root: string | undefined): void {
  const changed = changedSince(image.command.root, image.stamps);
  if (changed !== undefined) {
    throw new ToolstackError(
      'image-changed',
      `${join(image.command.root, changed)} was changed while a worker was started from it; find out who may write there, then start again`,
    );
  }
  if (root !== undefined && identityOf(root) !== identityIn(image.stamps.get(''))) {
    throw new ToolstackError(
      'image-changed',
      `the worker does not run from ${image.command.root}; find out who may write above it, then start again`,
    );
  }
}

function identityOf(path: string): string | undefined {
  // Through the link: /proc shows the directory itself behind it.
  const found = statSync(`${path}/`, { bigint: true, throwIfNoEntry: false });
  return found && `${found.dev}:${found.ino}`;
}
