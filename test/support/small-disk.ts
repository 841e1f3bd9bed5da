import { execFileSync } from 'node:child_process';
import { closeSync, mkdirSync, openSync, rmSync, statfsSync, writeSync } from 'node:fs';
import { join } from 'node:path';

const MIB = 2 ** 20;

/** A file system of its own under a directory: mounting takes root, and a test that cannot mount fails and says so. */
export class SmallDisk {
  readonly #filler: string;

  private constructor(readonly path: string) {
    this.#filler = join(path, 'filler');
  }

  /** @param size as tmpfs(5) has it, `300m` */
  static mount(path: string, size: string): SmallDisk {
    if (process.getuid?.() !== 0) throw new Error('this test mounts a file system: run it as root');
    mkdirSync(path, { recursive: true, mode: 0o700 });
    execFileSync('mount', ['-t', 'tmpfs', '-o', `size=${size},mode=700`, 'tmpfs', path]);
    return new SmallDisk(path);
  }

  get freeMiB(): number {
    const { bavail, bsize } = statfsSync(this.path);
    return (bavail * bsize) / MIB;
  }

  /** Takes space until only `leftMiB` are free; 0 takes the last page. */
  fill(leftMiB: number): void {
    const fd = openSync(this.#filler, 'a', 0o600);
    try {
      while (this.freeMiB - leftMiB > 1) writeSync(fd, Buffer.alloc(MIB));
      if (leftMiB === 0) for (;;) writeSync(fd, Buffer.alloc(4096));
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ENOSPC') throw error;
    } finally {
      closeSync(fd);
    }
  }

  /** Gives back what `fill` took. */
  clear(): void {
    rmSync(this.#filler, { force: true });
  }

  writable(isWritable: boolean): void {
    execFileSync('mount', ['-o', `remount,${isWritable ? 'rw' : 'ro'}`, this.path]);
  }

  unmount(): void {
    execFileSync('umount', [this.path]);
  }
}
