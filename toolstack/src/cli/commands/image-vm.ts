import { installedDigest } from '../../supervisor/image.js';
import { buildVmImage } from '../../vm/build.js';
import { collectVmSources } from '../../vm/sources.js';
import type { Context } from '../context.js';
import { fields } from '../output.js';

export interface BuildVmFlags {
  readonly kernelDeb?: string;
  readonly busyboxDeb?: string;
  readonly allow?: boolean;
  readonly note?: string;
}

/** Makes what workers with isolation `vm` run in. A supervisor that runs takes it for the next start. */
export async function buildVm(
  flags: BuildVmFlags,
  { configuration, manager, output }: Context,
): Promise<void> {
  const { kernelDeb, busyboxDeb, allow, note } = flags;
  const { vm } = configuration.paths.supervisor;
  const { packages } = buildVmImage({
    packages: { ...(kernelDeb && { kernel: kernelDeb }), ...(busyboxDeb && { busybox: busyboxDeb }) },
    directory: vm,
    say: (text) => output.note(text),
  });
  const digest = installedDigest(collectVmSources(vm));
  if (allow) await manager.allowImage(digest, note);
  output.result(
    { digest, directory: vm, packages, allowed: allow === true },
    `${fields([
      ['built', digest],
      ['from', packages.join(', ')],
      ['allowed', allow ? 'yes' : null],
    ])}${allow ? '' : `\nnext: vtpmctl image allow ${digest}`}`,
  );
}
