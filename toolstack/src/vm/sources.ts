import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { ToolstackError } from '../error.js';
import { collectSources, type ImageFile, type ImageSources, neededBy } from '../supervisor/image-sources.js';
import { QEMU_TEMPLATE, VM_PARTS } from './qemu.js';

/** What `vtpmctl image build-vm` leaves beside the parts it made, as `vm.json`. */
export interface VmImageManifest {
  readonly format: number;
  /** Debian's packages in it, `name version`. */
  readonly packages: readonly string[];
  /** Of the worker that is in its root, hex. */
  readonly guestDigest: string;
}

export const VM_IMAGE_FORMAT = 1;
export const BUILD_COMMAND = 'vtpmctl image build-vm';

/** Of QEMU's machine: the firmware, and what lets it start a kernel that is not on a disk. */
const FIRMWARE = ['bios-256k.bin', 'linuxboot_dma.bin', 'kvmvapic.bin'];
const FIRMWARE_DIRECTORIES = ['/usr/share/qemu', '/usr/share/seabios', '/usr/local/share/qemu'];
/** Loaded by QEMU itself, where Debian has it in a file of its own. */
const TCG_MODULE = 'accel-tcg-x86_64.so';

/** A manifest that the worker's build writes beside its bundles. */
export function bundledManifest(name: string): string {
  return fileURLToPath(new URL(`./bundle/${name}`, import.meta.resolve('vtpmd')));
}

/**
 * What runs on the host for a worker in a VM: its relay, QEMU with its libraries and firmware, and the parts of the VM.
 * All of it is measured as one image. @param built directory with the parts
 * @throws ToolstackError `missing-package` | `newer-format` | `corrupt`
 */
export function collectVmSources(built: string): ImageSources {
  const relay = collectSources(bundledManifest('vm-relay.json'));
  readVmManifest(built);
  const qemu = VM_PARTS.qemu;
  if (!existsSync(qemu)) {
    throw new ToolstackError(
      'missing-package',
      `${qemu} is not installed and --isolation vm needs it; on Debian: apt-get install --no-install-recommends qemu-system-x86`,
    );
  }
  const tcg = join(VM_PARTS.modules, TCG_MODULE);
  const modules = existsSync(tcg) ? [tcg] : [];
  const libraries = [qemu, ...modules].flatMap((path) => neededBy(path).libraries);
  const files: ImageFile[] = [
    ...relay.files,
    { from: qemu, to: qemu, executable: true },
    ...modules.map((path) => ({ from: path, to: path, executable: false })),
    ...libraries.map((from) => ({
      from,
      to: join(relay.libraries, from.slice(from.lastIndexOf('/') + 1)),
      executable: false,
    })),
    ...FIRMWARE.map((name) => ({
      from: findFirmware(name),
      to: join(VM_PARTS.firmware, name),
      executable: false,
    })),
    ...(['kernel', 'initramfs', 'root'] as const).map((name) => ({
      from: join(built, name),
      to: VM_PARTS[name],
      executable: false,
    })),
  ];
  // Several need the same library; the first one found is the one that the others would find.
  return {
    ...relay,
    argv: [...relay.argv, ...QEMU_TEMPLATE],
    files: [...new Map(files.toReversed().map((file) => [file.to, file])).values()].toReversed(),
  };
}

/** @throws ToolstackError `missing-package` | `newer-format` | `corrupt` */
export function readVmManifest(built: string): VmImageManifest {
  const path = join(built, 'vm.json');
  let manifest: Partial<VmImageManifest>;
  try {
    manifest = JSON.parse(readFileSync(path, 'utf8')) as Partial<VmImageManifest>;
  } catch (cause) {
    if ((cause as NodeJS.ErrnoException).code === 'ENOENT') {
      throw new ToolstackError(
        'missing-package',
        `there is no image for --isolation vm; make it: ${BUILD_COMMAND}`,
        {
          cause,
        },
      );
    }
    throw new ToolstackError('corrupt', `${path} cannot be read; make it again: ${BUILD_COMMAND}`, { cause });
  }
  if (typeof manifest.format === 'number' && manifest.format > VM_IMAGE_FORMAT) {
    throw new ToolstackError(
      'newer-format',
      `${path} has format ${manifest.format}, this version knows ${VM_IMAGE_FORMAT}; make it again: ${BUILD_COMMAND}`,
    );
  }
  const { format, packages, guestDigest } = manifest;
  if (format !== VM_IMAGE_FORMAT || !Array.isArray(packages) || typeof guestDigest !== 'string') {
    throw new ToolstackError('corrupt', `${path} is not what it must be; make it again: ${BUILD_COMMAND}`);
  }
  return { format, packages: packages as string[], guestDigest };
}

function findFirmware(name: string): string {
  const path = FIRMWARE_DIRECTORIES.map((directory) => join(directory, name)).find(existsSync);
  if (path) return path;
  throw new ToolstackError(
    'missing-package',
    `QEMU's ${name} is not installed; on Debian: apt-get install --no-install-recommends qemu-system-x86`,
  );
}
