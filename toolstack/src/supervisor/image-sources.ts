import { execFileSync } from 'node:child_process';
import { existsSync, readFileSync } from 'node:fs';
import { dirname, join, normalize, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { VERSION } from 'vtpm-common';
import { ToolstackError } from '../error.js';

/** What a worker consists of, before it is copied and measured. */
export interface ImageSources {
  readonly files: readonly ImageFile[];
  readonly node: string;
  readonly loader: string;
  readonly libraries: string;
  readonly argv: readonly string[];
  readonly env: Readonly<Record<string, string>>;
}

export interface ImageFile {
  /** On the host. */
  readonly from: string;
  /** Absolute path inside the image. */
  readonly to: string;
  readonly executable: boolean;
}

const NODE = '/usr/bin/node';

/** The manifest that the worker's build writes beside its bundle. */
export function defaultManifest(): string {
  return fileURLToPath(new URL('./bundle/image.json', import.meta.resolve('vtpmd')));
}

/**
 * The manifest's files, the interpreter that runs this supervisor, the dynamic loader and every shared library that
 * any of them needs. @throws ToolstackError `missing-package` | `corrupt` | `newer-format`
 */
export function collectSources(manifestPath: string): ImageSources {
  const manifest = readManifest(manifestPath);
  const interpreter = process.execPath;
  const own = neededBy(interpreter);
  const libc = own.libraries.find((path) => path.endsWith('/libc.so.6'));
  if (!own.loader || !libc) {
    throw new ToolstackError(
      'missing-package',
      `${interpreter} is not a dynamically linked glibc program; workers need one, on Debian: apt-get install nodejs`,
    );
  }
  const directory = dirname(libc);
  const named = manifest.libraries.map((name) => findLibrary(name, directory));
  const libraries = new Map<string, string>();
  const natives = manifest.files.filter(({ from }) => /\.(node|so)$/.test(from)).map(({ from }) => from);
  for (const path of [
    ...own.libraries,
    ...named,
    ...[...named, ...natives].flatMap((p) => neededBy(p).libraries),
  ]) {
    const name = path.slice(path.lastIndexOf('/') + 1);
    if (!libraries.has(name)) libraries.set(name, path);
  }
  const files: ImageFile[] = [
    { from: interpreter, to: NODE, executable: true },
    { from: own.loader, to: own.loader, executable: true },
    // One directory for all: the loader has it compiled in, and the image has no ld.so.cache.
    ...[...libraries].map(([name, from]) => ({ from, to: join(directory, name), executable: false })),
    ...manifest.files.map(({ from, to }) => ({ from, to, executable: false })),
  ];
  const targets = new Set(files.map(({ to }) => to));
  if (targets.size !== files.length) {
    throw new ToolstackError('corrupt', `${manifestPath}: two files have the same place in the image`);
  }
  return {
    files,
    node: NODE,
    loader: own.loader,
    libraries: directory,
    argv: manifest.argv,
    env: manifest.env,
  };
}

/** The format number of the manifest; a newer one is refused by name. */
const MANIFEST_FORMAT = 1;

interface Manifest {
  readonly files: readonly { readonly from: string; readonly to: string }[];
  readonly libraries: readonly string[];
  readonly argv: readonly string[];
  readonly env: Readonly<Record<string, string>>;
}

function readManifest(path: string): Manifest {
  let content: unknown;
  try {
    content = JSON.parse(readFileSync(path, 'utf8'));
  } catch (cause) {
    if ((cause as NodeJS.ErrnoException).code === 'ENOENT') {
      throw new ToolstackError('missing-package', `${path} is missing; build it: npm run build`, { cause });
    }
    throw new ToolstackError(
      'corrupt',
      `${path} cannot be read: ${(cause as Error).message}; build it: npm run build`,
      {
        cause,
      },
    );
  }
  const { format, version, files, libraries, nodeArguments, main, environment } = (content ?? {}) as Record<
    string,
    unknown
  >;
  if (typeof format === 'number' && format > MANIFEST_FORMAT) {
    throw new ToolstackError(
      'newer-format',
      `${path} has format ${format}, this version knows ${MANIFEST_FORMAT}`,
    );
  }
  if (version !== VERSION) {
    throw new ToolstackError(
      'newer-format',
      `${path} is of version ${String(version)} and this program is of ${VERSION}; restart the supervisor`,
    );
  }
  const start =
    Array.isArray(files) && files.every(isFile) ? files.find(({ name }) => name === main) : undefined;
  if (!start || !isTextList(libraries) || !isTextList(nodeArguments) || !isEnvironment(environment)) {
    throw new ToolstackError('corrupt', `${path} is not the manifest of a worker; build it: npm run build`);
  }
  return {
    files: (files as ManifestFile[]).map(({ source, target }) => ({
      from: resolve(dirname(path), source),
      to: target,
    })),
    libraries,
    argv: [...nodeArguments, start.target],
    env: environment,
  };
}

interface ManifestFile {
  readonly name: string;
  /** Relative to the manifest. */
  readonly source: string;
  /** Absolute, inside the image. */
  readonly target: string;
}

function isFile(value: unknown): value is ManifestFile {
  const { name, source, target } = (value ?? {}) as Record<string, unknown>;
  const isPlace = typeof target === 'string' && target.startsWith('/') && normalize(target) === target;
  return typeof name === 'string' && typeof source === 'string' && isPlace;
}

function isTextList(value: unknown): value is string[] {
  return Array.isArray(value) && value.every((item) => typeof item === 'string');
}

function isEnvironment(value: unknown): value is Record<string, string> {
  return typeof value === 'object' && value !== null && isTextList(Object.values(value));
}

/** The loader and the shared libraries of a program or library, as ldd(1) resolves them. */
export function neededBy(path: string): { loader: string | undefined; libraries: string[] } {
  const text = execFileSync('ldd', [path], {
    env: { PATH: process.env.PATH ?? '/usr/bin', LC_ALL: 'C' },
    encoding: 'utf8',
  });
  const libraries: string[] = [];
  let loader: string | undefined;
  for (const line of text.split('\n')) {
    const missing = /^\s*(\S+) => not found/.exec(line);
    if (missing) {
      throw new ToolstackError('missing-package', `${path} needs ${missing[1]}, which is not installed`);
    }
    const found = /^\s*(?:\S+ => )?(\/\S+) \(0x/.exec(line)?.[1];
    if (!found) continue;
    if (/\/ld[^/]*\.so[^/]*$/.test(found)) loader = found;
    else libraries.push(found);
  }
  return { loader, libraries };
}

function findLibrary(name: string, libcDirectory: string): string {
  const directories = [
    libcDirectory,
    join('/usr', libcDirectory),
    '/usr/local/lib',
    '/usr/lib64',
    '/lib64',
    '/usr/lib',
    '/lib',
  ];
  for (const directory of directories) {
    const path = join(directory, name);
    if (existsSync(path)) return path;
  }
  const hint = name.startsWith('libtpms') ? '; on Debian: apt-get install libtpms0' : '';
  throw new ToolstackError('missing-package', `${name} is not installed${hint}`);
}
