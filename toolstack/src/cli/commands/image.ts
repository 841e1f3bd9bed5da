import { ToolstackError } from '../../error.js';
import { installedDigest } from '../../supervisor/image.js';
import { collectSources, defaultManifest } from '../../supervisor/image-sources.js';
import type { Context } from '../context.js';
import { checkInstalled, checkOwnPackage, type Provenance } from '../installed-files.js';
import { bytes, table, time } from '../output.js';

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

/** What is in the image that the supervisor starts workers from. */
export async function showImage({ manager, supervisor, output }: Context): Promise<void> {
  const { digest, parts, argv, env } = await supervisor.image();
  const known = await manager.images().then(
    (images) => images.find((image) => image.digest === digest) ?? null,
    () => undefined,
  );
  const allowed =
    known === undefined ? 'not known' : known === null ? 'no' : `${time(known.allowedAt)}  ${known.note}`;
  output.result(
    { digest, parts, argv, env, allowed: known ?? null },
    [
      `digest     ${digest}`,
      `allowed    ${allowed.trimEnd()}`,
      `arguments  ${argv.join(' ')}`,
      ...Object.entries(env).map(([name, value]) => `variable   ${name}=${value}`),
      '',
      table(
        ['FILE', 'SIZE', 'SHA-256'],
        parts.map(({ name, bytes: size, sha256 }) => [name, bytes(size), sha256]),
      ),
    ].join('\n'),
  );
}

export interface AllowFlags {
  readonly note?: string;
  readonly installed?: boolean;
  readonly replace?: boolean;
}

/** Without a digest, the image that the supervisor runs now. */
export async function allowImage(
  digest: string | undefined,
  flags: AllowFlags,
  context: Context,
): Promise<void> {
  if (flags.installed) return await allowInstalled(digest, flags, context);
  if (flags.replace) throw new ToolstackError('usage', '--replace goes with --installed');
  const { manager, supervisor, output } = context;
  const chosen = digest === undefined ? (await supervisor.image()).digest : checked(digest);
  await manager.allowImage(chosen, flags.note);
  output.result({ digest: chosen, note: flags.note ?? null }, `allowed  ${chosen}`);
}

/** How the note of an image begins that was allowed because of its packages. */
const OF_PACKAGES = 'packages: ';
const MAX_NOTE_LENGTH = 1000;

/**
 * The image that the packages of this host make, once dpkg has said of each of its files that it is the package's. The
 * supervisor starts workers from it from then on, where it runs.
 */
async function allowInstalled(
  digest: string | undefined,
  { note, replace }: AllowFlags,
  { manager, supervisor, output }: Context,
): Promise<void> {
  if (digest !== undefined || note !== undefined) {
    throw new ToolstackError('usage', '--installed finds the digest and makes the note itself');
  }
  const sources = collectSources(defaultManifest());
  const found = installedDigest(sources);
  const own = checkOwnPackage();
  const files = checkInstalled(sources.files.map(({ from }) => from));
  if (installedDigest(sources) !== found) {
    throw new ToolstackError('busy', 'a package is being installed just now; try again afterwards');
  }
  const text = noteOf([own, ...files]);
  const before = await manager.images();
  const isNew = !before.some((image) => image.digest === found && image.note === text);
  if (isNew) await manager.allowImage(found, text);
  const refreshed = await supervisor.refreshImage(found).then(
    () => true,
    (error: unknown) => {
      const { code, message } = ToolstackError.from(error);
      if (code !== 'not-running') output.note(`the supervisor stays with the image that it has: ${message}`);
      return code === 'not-running';
    },
  );
  const old = before.filter((image) => image.digest !== found && image.note.startsWith(OF_PACKAGES));
  const removed = replace && refreshed ? old.map((image) => image.digest) : [];
  for (const one of removed) await manager.removeImage(one);
  output.result(
    { digest: found, note: text, isNew, files, removed },
    [
      table(
        ['FILE', 'PACKAGE', 'VERSION'],
        files.map(({ path, package: name, version }) => [path, name, version]),
      ),
      '',
      `${isNew ? 'allowed' : 'allowed already'}  ${found}`,
      ...removed.map((one) => `removed  ${one}`),
    ].join('\n'),
  );
}

function noteOf(files: readonly Provenance[]): string {
  const versions = new Map(files.map((file) => [file.package.replace(/:.*$/, ''), file.version]));
  const list = [...versions].map(([name, version]) => `${name} ${version}`).join(', ');
  return `${OF_PACKAGES}${list}`.slice(0, MAX_NOTE_LENGTH);
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
