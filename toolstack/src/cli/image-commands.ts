import type { Command } from 'commander';
import type { Add, Run } from './command-line.js';
import { type AllowFlags, allowImage, listImages, removeImage, showImage } from './commands/image.js';
import { type BuildVmFlags, buildVm } from './commands/image-vm.js';

/** @param imageCommand which they go below */
export function addImageCommands(imageCommand: Command, add: Add, run: Run): void {
  const imageList = add(imageCommand, 'list', 'shows the allowed worker images', ['vtpmctl image list']);
  imageList.action(() => run(imageList, listImages));
  const imageAllow = add(imageCommand, 'allow', 'allows a worker image', [
    'vtpmctl image allow                                the one that the supervisor runs',
    'vtpmctl image allow DIGEST --note "release 1.2"',
    'vtpmctl image allow --installed                    what dpkg vouches for, after an upgrade',
  ])
    .argument('[digest]', '64 hex digits (default: the image that the supervisor runs)')
    .option('--note <text>', 'why, for who reads the list later')
    .option(
      '--installed',
      'the image that the installed packages make, if each of its files is as its package has it',
    )
    .option('--replace', 'with --installed: remove the images that were allowed like this before');
  imageAllow.action((digest: string | undefined, flags: AllowFlags) =>
    run(imageAllow, (context) => allowImage(digest, flags, context)),
  );
  const imageShow = add(imageCommand, 'show', 'shows what is in the image that the supervisor runs', [
    'vtpmctl image show',
  ]);
  imageShow.action(() => run(imageShow, showImage));
  const imageRemove = add(imageCommand, 'remove', 'no vTPM starts from this image any more', [
    'vtpmctl image remove DIGEST',
  ])
    .alias('deny')
    .argument('<digest>', '64 hex digits');
  imageRemove.action((digest: string) => run(imageRemove, (context) => removeImage(digest, context)));
  const imageBuildVm = add(imageCommand, 'build-vm', 'makes the image for workers in VMs (--isolation vm)', [
    'vtpmctl image build-vm                             from the packages that apt finds',
    'vtpmctl image build-vm --allow                     and lets the manager give state to it',
    'vtpmctl image build-vm --kernel-deb linux-image-6.1.0-56-cloud-amd64_6.1.192-2_amd64.deb',
  ])
    .option('--kernel-deb <file>', "Debian's linux-image-…-cloud-amd64 (default: downloaded with apt-get)")
    .option('--busybox-deb <file>', "Debian's busybox-static (default: downloaded with apt-get)")
    .option('--allow', 'allow it at the manager too')
    .option('--note <text>', 'with --allow: why, for who reads the list later');
  imageBuildVm.action((flags: BuildVmFlags) => run(imageBuildVm, (context) => buildVm(flags, context)));
}
