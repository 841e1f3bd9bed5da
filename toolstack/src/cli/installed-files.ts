import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, readFileSync, realpathSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { ToolstackError } from '../error.js';

/** Of which package a file is, and that it is as the package has it. */
export interface Provenance {
  readonly path: string;
  /** As dpkg names it, `libc6:amd64`. */
  readonly package: string;
  readonly version: string;
}

const DPKG_QUERY = '/usr/bin/dpkg-query';

/**
 * Compares files with what their packages say of them. MD5 is what dpkg has; it keeps a file from being replaced by
 * another, since only who makes a package can make two contents with one sum.
 * @throws ToolstackError `missing-package` where this system has no dpkg; `image-not-allowed` where a file is of no
 * package, of one that is not wholly installed, or not as the package has it
 */
export function checkInstalled(paths: readonly string[]): Provenance[] {
  const owners = ownersOf(paths);
  const versions = versionsOf([...new Set([...owners.values()].map(({ owner }) => owner))]);
  const sums = new Map<string, ReadonlyMap<string, string>>();
  return paths.map((path) => {
    const found = owners.get(path);
    if (!found) throw refused(`${path} is of no package`);
    const { owner, known } = found;
    const version = versions.get(owner);
    if (version === undefined) throw refused(`${path} is of ${owner}, which is not wholly installed`);
    let ofOwner = sums.get(owner);
    if (!ofOwner) {
      ofOwner = sumsOf(owner);
      sums.set(owner, ofOwner);
    }
    const expected = ofOwner.get(known);
    if (expected === undefined) throw refused(`${owner} says nothing of the content of ${path}`);
    if (md5(path) !== expected) throw refused(`${path} is not as ${owner} ${version} has it`);
    return { path, package: owner, version };
  });
}

/**
 * All that this vtpmctl's own package installed, but for its configuration: what decides how a worker is confined is
 * among it. @throws ToolstackError as `checkInstalled`
 */
export function checkOwnPackage(): Provenance {
  const anchor = realpathSync(fileURLToPath(new URL('../../package.json', import.meta.url)));
  const [own] = checkInstalled([anchor]);
  if (!own) throw refused(`${anchor} is of no package`);
  for (const [path, expected] of sumsOf(own.package)) {
    if (!existsSync(path)) throw refused(`${path} of ${own.package} is missing`);
    if (md5(path) !== expected) throw refused(`${path} is not as ${own.package} ${own.version} has it`);
  }
  return own;
}

/** The package of each path, and the name under which that package has it. */
function ownersOf(paths: readonly string[]): Map<string, { owner: string; known: string }> {
  const asked = new Map(paths.map((path) => [path, namesOf(path)]));
  // Those that no package has make it end with 1; the others are there all the same.
  const text = query(['--search', '--', ...new Set([...asked.values()].flat())], [0, 1]);
  const owners = new Map<string, string>();
  for (const line of text.split('\n')) {
    const [, owner, path] = /^([a-z0-9][^\s,]*): (\/.*)$/.exec(line) ?? [];
    if (owner !== undefined && path !== undefined) owners.set(path, owner);
  }
  const found = new Map<string, { owner: string; known: string }>();
  for (const [path, names] of asked) {
    for (const known of names) {
      const owner = owners.get(known);
      if (owner !== undefined && !found.has(path)) found.set(path, { owner, known });
    }
  }
  return found;
}

/** A package may have put it below /lib where it is below /usr/lib now, or the other way. */
function namesOf(path: string): string[] {
  const real = realpathSync(path);
  return [real, real.startsWith('/usr/') ? real.slice('/usr'.length) : join('/usr', real)];
}

function versionsOf(packages: readonly string[]): Map<string, string> {
  if (packages.length === 0) return new Map();
  // biome-ignore lint/suspicious/noTemplateCurlyInString: dpkg-query's own.
  const format = '--showformat=${binary:Package}\t${Version}\t${db:Status-Status}\n';
  const lines = query(['--show', format, '--', ...packages], [0]).split('\n');
  return new Map(
    lines
      .map((line) => line.split('\t'))
      // While triggers run the packages that they wait for are unpacked, and their files in place.
      .filter(([, , status]) => /^(installed|triggers-|unpacked|half-configured)/.test(status ?? ''))
      .map(([name = '', version = '']) => [name, version]),
  );
}

/** Path to MD5, hex. Configuration files, which the operator may change, are not among them. */
function sumsOf(name: string): Map<string, string> {
  const lines = query(['--control-show', name, 'md5sums'], [0]).split('\n');
  return new Map(
    lines.flatMap((line): [string, string][] => {
      const [, sum, path] = /^([0-9a-f]{32}) {2}(.+)$/.exec(line) ?? [];
      return sum === undefined || path === undefined ? [] : [[`/${path}`, sum]];
    }),
  );
}

function md5(path: string): string {
  return createHash('md5').update(readFileSync(path)).digest('hex');
}

function query(args: readonly string[], good: readonly number[]): string {
  const { error, status, stdout, stderr } = spawnSync(DPKG_QUERY, args, {
    encoding: 'utf8',
    env: { LC_ALL: 'C' },
    maxBuffer: 64 * 1024 * 1024,
  });
  if (error) {
    throw new ToolstackError(
      'missing-package',
      `only dpkg can say what is of a package, and ${DPKG_QUERY} cannot be run (${error.message}); look at the image yourself: vtpmctl image show, vtpmctl image allow`,
      { cause: error },
    );
  }
  if (!good.includes(status ?? -1)) throw refused(`dpkg-query ${args[0]} failed: ${stderr.trim()}`);
  return stdout;
}

function refused(what: string): ToolstackError {
  return new ToolstackError(
    'image-not-allowed',
    `${what}: the image is not allowed; find out why, or look at it yourself: vtpmctl image show, vtpmctl image allow`,
  );
}
