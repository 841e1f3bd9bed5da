import { readdirSync } from 'node:fs';
import { join } from 'node:path';
import { type Installation, REPOSITORY } from './installation.js';

const PACKAGES = join(REPOSITORY, '.build/debian');

/** The file of a package that scripts/setup.sh brought. */
export function debianPackage(prefix: string): string {
  const file = readdirSync(PACKAGES).find((name) => name.startsWith(prefix) && name.endsWith('.deb'));
  if (!file) throw new Error(`${PACKAGES} has no ${prefix}…: bash scripts/setup.sh long`);
  return join(PACKAGES, file);
}

/** Makes the image for workers in VMs and allows it, from the packages that scripts/setup.sh brought. @returns its digest */
export async function buildVmImage(installation: Installation): Promise<string> {
  const { digest } = await installation.ctlJson(
    ...['image', 'build-vm', '--allow', '--note', 'test'],
    ...['--kernel-deb', debianPackage('linux-image-'), '--busybox-deb', debianPackage('busybox-static')],
  );
  return String(digest);
}
