import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { closeSync, openSync } from 'node:fs';
import { join, relative } from 'node:path';
import { ToolstackError } from '../error.js';
import { findProgram, VIEW_ROOT } from './sandbox.js';

/**
 * A mount namespace that shows the images, read-only, at VIEW_ROOT, where a worker's own uid can get to them. The
 * directories above them stay closed to everybody: nothing else below those is anybody's business. No process is in the
 * namespace and no file names it; the descriptor alone keeps it, so it ends with the supervisor.
 */
export class ImageView {
  private constructor(
    private readonly descriptor: number,
    private readonly images: string,
  ) {}

  /** For nsenter(1), of root. */
  get path(): string {
    return `/proc/${process.pid}/fd/${this.descriptor}`;
  }

  /** @param path below the images, as the host sees it @returns as it is seen here */
  pathOf(path: string): string {
    return join(VIEW_ROOT, relative(this.images, path));
  }

  /** Needs CAP_SYS_ADMIN. @param images directory of the images @throws ToolstackError `missing-package` | `layer-missing` with what the kernel said */
  static async open(images: string): Promise<ImageView> {
    const script = 'mount --rbind -- "$0" "$1" && mount -o remount,bind,ro -- "$1" && echo && exec cat';
    const args = ['--mount', '--propagation', 'private', '--', '/bin/sh', '-c', script, images, VIEW_ROOT];
    const maker = spawn(findProgram('unshare'), args, { stdio: ['pipe', 'pipe', 'pipe'] });
    let said = '';
    maker.stderr.setEncoding('utf8').on('data', (text: string) => {
      said += text;
    });
    const ended = once(maker, 'close').catch((error: Error) => {
      said = error.message;
    });
    maker.stdin.on('error', () => undefined);
    try {
      const isMade = await Promise.race([
        once(maker.stdout, 'data').then(() => true),
        ended.then(() => false),
      ]);
      if (!isMade || maker.pid === undefined) {
        throw new ToolstackError(
          'layer-missing',
          said.trim().split('\n')[0] || 'no mount namespace can be made',
        );
      }
      return new ImageView(openSync(`/proc/${maker.pid}/ns/mnt`, 'r'), images);
    } finally {
      maker.stdin.end();
      await ended;
    }
  }

  close(): void {
    closeSync(this.descriptor);
  }
}
