import type { Context } from '../context.js';
import { fields } from '../output.js';

/**
 * The running supervisor goes on as the program that is installed now. Workers keep the image that they were started from;
 * those to come get the one that is installed.
 */
export async function upgradeSupervisor({ supervisor, manager, output }: Context): Promise<void> {
  const before = await supervisor.health();
  const after = await supervisor.upgrade();
  const version = before.version === after.version ? after.version : `${before.version} -> ${after.version}`;
  output.result(
    { before: before.version, version: after.version, imageDigest: after.imageDigest, vtpms: after.vtpms },
    fields([
      ['version', version],
      ['image', after.imageDigest],
      ['vtpms', after.vtpms],
    ]),
  );
  const images = await manager.images().catch(() => undefined);
  if (images && !images.some(({ digest }) => digest === after.imageDigest)) {
    output.note(
      `no vTPM starts from the image ${after.imageDigest} before it is allowed: vtpmctl image allow; those that run go on, and where a worker ends its guest waits until then`,
    );
  }
}
