import { ToolstackError } from '../../error.js';
import type { Context } from '../context.js';
import { table, time } from '../output.js';

const DIGEST = /^[0-9a-f]{64}$/;

/** The worker images the manager gives state to, and which one the supervisor runs. */
export async function listImages({ manager, supervisor, output }: Context): Promise<void> {
  const images = await manager.images();
  const current = await supervisor.image().then(
    ({ digest }) => digest,
    () => null,
  );
  const rows = images.map(({ digest, note, allowedAt }) => [
    digest,
    digest === current ? 'yes' : '',
    time(allowedAt),
    note,
  ]);
  output.result(
    { images: images.map((image) => ({ ...image, current: image.digest === current })), current },
    rows.length === 0
      ? 'no image is allowed; allow the one that the supervisor runs: vtpmctl image allow'
      : table(['DIGEST', 'CURRENT', 'ALLOWED', 'NOTE'], rows),
  );
  if (current !== null && rows.length > 0 && !images.some(({ digest }) => digest === current)) {
    output.note(`the supervisor runs ${current}, which is not allowed; to allow it: vtpmctl image allow`);
  }
}

/** Without a digest, the image that the supervisor runs now. */
export async function allowImage(
  digest: string | undefined,
  flags: { readonly note?: string },
  { manager, supervisor, output }: Context,
): Promise<void> {
  const chosen = digest === undefined ? (await supervisor.image()).digest : checked(digest);
  await manager.allowImage(chosen, flags.note);
  output.result({ digest: chosen, note: flags.note ?? null }, `allowed  ${chosen}`);
}

/** Workers that run keep running; none starts from this image any more. */
export async function removeImage(digest: string, { manager, output }: Context): Promise<void> {
  const chosen = checked(digest);
  await manager.removeImage(chosen);
  output.result({ digest: chosen }, `removed  ${chosen}`);
}

function checked(digest: string): string {
  const lower = digest.toLowerCase();
  if (DIGEST.test(lower)) return lower;
  throw new ToolstackError(
    'usage',
    `a digest is 64 hex digits, as vtpmctl image list shows them, not "${digest.slice(0, 80)}"`,
  );
}
