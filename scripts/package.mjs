// Makes dist/vtpm-manager_VERSION_ARCH.deb from what is built, with dpkg-deb alone. The same content and SOURCE_DATE_EPOCH
// make the same bytes.
import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import {
  chmodSync,
  cpSync,
  existsSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  utimesSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, dirname, join, relative } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('..', import.meta.url));
const NAME = 'vtpm-manager';
const LIBRARY = `usr/lib/${NAME}`;
/** What an installation consists of; what these need follows. */
const PACKAGES = ['vtpm-toolstack', 'vtpm-manager', 'vtpmd', 'vtpm-frontend-driver'];
const PROGRAMS = {
  'usr/bin/vtpmctl': 'vtpm-toolstack/bin/vtpmctl.js',
  'usr/bin/vtpm-frontend': 'vtpm-frontend-driver/bin/vtpm-frontend.js',
  // Not in a directory of PATH: there they would take the place of swtpm's own commands for everybody.
  [`${LIBRARY}/dropin/swtpm`]: 'vtpm-toolstack/bin/dropin/swtpm',
  [`${LIBRARY}/dropin/swtpm_setup`]: 'vtpm-toolstack/bin/dropin/swtpm_setup',
  [`${LIBRARY}/dropin/swtpm_ioctl`]: 'vtpm-toolstack/bin/dropin/swtpm_ioctl',
  'usr/sbin/vtpm-managerd': 'vtpm-manager/bin/vtpm-managerd.js',
  'usr/sbin/vtpm-supervisord': 'vtpm-toolstack/bin/vtpm-supervisord.js',
};

const OURS = /^(vtpm|tpm2-ts-bindings)/;
/** Directories at the top of a package that no program reads. */
const NOT_RUN = new Set([
  'test',
  'tests',
  'docs',
  'doc',
  'benchmarks',
  'examples',
  'vendor',
  `musl_${process.arch}`,
]);
/** Who makes the manager's user. */
const SYSUSERS = 'systemd | systemd-standalone-sysusers, systemd | systemd-standalone-tmpfiles';

const { version, license } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'));
const output = argument('--out') ?? join(root, 'dist');
const packageVersion = argument('--version') ?? version;
const architecture = execFileSync('dpkg', ['--print-architecture'], { encoding: 'utf8' }).trim();
const multiarch = `${{ x64: 'x86_64', arm64: 'aarch64' }[process.arch] ?? process.arch}-linux-gnu`;
const epoch = Number(process.env.SOURCE_DATE_EPOCH ?? lastCommit());
const stage = mkdtempSync(join(tmpdir(), 'vtpm-deb-'));

try {
  chmodSync(stage, 0o755);
  addModules();
  addPrograms();
  addServices();
  addDocumentation();
  addControl();
  settle(stage);
  mkdirSync(output, { recursive: true });
  const file = join(output, `${NAME}_${packageVersion}_${architecture}.deb`);
  execFileSync('dpkg-deb', ['--root-owner-group', '-Zgzip', '-z9', '--build', stage, file], {
    stdio: ['ignore', 'ignore', 'inherit'],
    env: { ...process.env, SOURCE_DATE_EPOCH: String(epoch) },
  });
  process.stdout.write(`${file}\n`);
} finally {
  rmSync(stage, { recursive: true, force: true });
}

/** Every package that is needed at run time, found as Node finds it, side by side below one node_modules. */
function addModules() {
  const found = new Map();
  for (const name of PACKAGES) collect(name, join(root, 'node_modules', name), found);
  for (const [place, from] of found) {
    cpSync(from, join(stage, LIBRARY, 'node_modules', place), {
      recursive: true,
      dereference: true,
      filter: (path) => isWanted(relative(from, path), OURS.test(place)),
    });
  }
}

/** @param place below node_modules */
function collect(place, from, found) {
  if (found.has(place)) return;
  found.set(place, from);
  const { dependencies = {}, optionalDependencies = {} } = JSON.parse(
    readFileSync(join(from, 'package.json'), 'utf8'),
  );
  for (const name of Object.keys({ ...dependencies, ...optionalDependencies })) {
    const nested = join(from, 'node_modules', name);
    const isNested = existsSync(nested);
    const path = isNested ? nested : join(root, 'node_modules', name);
    // Optional ones of other platforms are not there.
    if (existsSync(path)) collect(isNested ? `${place}/node_modules/${name}` : name, path, found);
    else if (name in dependencies) throw new Error(`${place} needs ${name}, which is not installed: npm ci`);
  }
}

/** What runs, and under which terms; nested packages come on their own. */
function isWanted(path, isOurs) {
  const parts = path.split('/');
  if (path === '') return true;
  if (isOurs && !['dist', 'bin', 'package.json'].includes(parts[0])) return false;
  // The worker's bundle has its native addon below a node_modules of its own.
  if (parts.includes('node_modules') && !path.startsWith('dist/bundle')) return false;
  if (NOT_RUN.has(parts[0])) return false;
  return (
    !basename(path).includes('.') ||
    /\.([cm]?js|json|txt)$|(?<!\.musl)\.node$|^licen[cs]e/i.test(basename(path))
  );
}

/** Daemons and commands are links to the programs, which name the system's Node.js whatever PATH says. */
function addPrograms() {
  for (const [link, program] of Object.entries(PROGRAMS)) {
    const file = join(stage, LIBRARY, 'node_modules', program);
    writeFileSync(file, readFileSync(file, 'utf8').replace(/^#!.*/, '#!/usr/bin/node'));
    chmodSync(file, 0o755);
    mkdirSync(join(stage, dirname(link)), { recursive: true });
    symlinkSync(relative(dirname(link), join(LIBRARY, 'node_modules', program)), join(stage, link));
  }
}

function addServices() {
  for (const unit of readdirSync(join(root, 'packaging/systemd')).filter((name) =>
    /\.(service|socket)$/.test(name),
  )) {
    put(`packaging/systemd/${unit}`, `lib/systemd/system/${unit}`);
  }
  put('packaging/systemd/sysusers.conf', `usr/lib/sysusers.d/${NAME}.conf`);
  put('packaging/systemd/tmpfiles.conf', `usr/lib/tmpfiles.d/${NAME}.conf`);
  put('packaging/allow-installed', `${LIBRARY}/allow-installed`, 0o755);
  put('packaging/debian/default', `etc/default/${NAME}`);
}

function addDocumentation() {
  for (const name of readdirSync(join(root, 'docs'))) put(`docs/${name}`, `usr/share/doc/${NAME}/${name}`);
  put('README.md', `usr/share/doc/${NAME}/README.md`);
  const text = readFileSync(join(root, 'LICENSE'), 'utf8');
  // Each package below node_modules has its own.
  write(
    `usr/share/doc/${NAME}/copyright`,
    `${NAME}: ${license}. What is below /${LIBRARY}/node_modules: see there.\n\n${text}`,
  );
}

function addControl() {
  const installed = Math.ceil(
    files(stage).reduce((sum, file) => sum + lstatSync(join(stage, file)).size, 0) / 1024,
  );
  const sums = files(stage)
    .filter((file) => lstatSync(join(stage, file)).isFile() && !file.startsWith('etc/'))
    .map(
      (file) =>
        `${createHash('md5')
          .update(readFileSync(join(stage, file)))
          .digest('hex')}  ${file}\n`,
    );
  const control = {
    Package: NAME,
    Version: packageVersion,
    Architecture: architecture,
    Maintainer: 'The vTPM manager service project <root@localhost>',
    'Installed-Size': installed,
    Depends: `nodejs (>= 20.19), libtpms0 (>= 0.9), libc6, libstdc++6, bubblewrap (>= 0.8), util-linux, ${SYSUSERS}`,
    Recommends: 'tpm-udev',
    Suggests: 'tpm2-tools, libtss2-tcti-swtpm0, swtpm-tools',
    Section: 'admin',
    Priority: 'optional',
    Description: [
      "virtual TPM 2.0 devices whose state is protected by the host's TPM",
      ' vtpm-managerd owns the TPM and keeps the state of every virtual TPM, vtpm-supervisord',
      ' runs each in a sandbox of its own, vtpmctl makes, runs and inspects them.',
    ].join('\n'),
  };
  write(
    'DEBIAN/control',
    Object.entries(control)
      .map(([key, value]) => `${key}: ${value}\n`)
      .join(''),
  );
  write('DEBIAN/md5sums', sums.join(''));
  write('DEBIAN/conffiles', `/etc/default/${NAME}\n`);
  write(
    'DEBIAN/triggers',
    readFileSync(join(root, 'packaging/debian/triggers'), 'utf8').replaceAll('@MULTIARCH@', multiarch),
  );
  for (const script of ['postinst', 'prerm', 'postrm'])
    put(`packaging/debian/${script}`, `DEBIAN/${script}`, 0o755);
}

function put(from, to, mode = 0o644) {
  write(to, readFileSync(join(root, from)), mode);
}

function write(path, content, mode = 0o644) {
  const file = join(stage, path);
  mkdirSync(dirname(file), { recursive: true });
  writeFileSync(file, content);
  chmodSync(file, mode);
}

/** Modes and times that do not depend on who builds, where and when. */
function settle(path) {
  const stat = lstatSync(path);
  if (stat.isSymbolicLink()) return;
  if (stat.isDirectory()) for (const name of readdirSync(path)) settle(join(path, name));
  chmodSync(path, stat.isDirectory() || (stat.mode & 0o100) !== 0 ? 0o755 : 0o644);
  utimesSync(path, epoch, epoch);
}

/** Files and links below a directory, sorted, without the control files. */
function files(directory) {
  return readdirSync(directory, { recursive: true, withFileTypes: true })
    .filter((item) => !item.isDirectory())
    .map((item) => relative(directory, join(item.parentPath, item.name)))
    .filter((file) => !file.startsWith('DEBIAN/'))
    .sort();
}

function argument(name) {
  const at = process.argv.indexOf(name);
  return at < 0 ? undefined : process.argv[at + 1];
}

function lastCommit() {
  return execFileSync('git', ['-C', root, 'log', '-1', '--format=%ct'], { encoding: 'utf8' }).trim();
}
