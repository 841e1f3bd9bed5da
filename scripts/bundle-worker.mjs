// Makes the worker's images in vtpmd/dist/bundle: a bundle for each program, koffi's native addon, and a manifest for each
// image: image.json (a worker in a sandbox), vm-guest.json (a worker in a VM), vm-relay.json (what is beside that VM).
import { copyFileSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { build } from 'esbuild';

const root = fileURLToPath(new URL('..', import.meta.url));
const bundle = `${root}vtpmd/dist/bundle`;
rmSync(bundle, { recursive: true, force: true });

await build({
  entryPoints: {
    vtpmd: `${root}vtpmd/dist/worker-main.js`,
    'vm-guest': `${root}vtpmd/dist/vm-main.js`,
    'vm-relay': `${root}vtpmd/dist/vm-relay-main.js`,
  },
  outdir: bundle,
  outExtension: { '.js': '.cjs' },
  bundle: true,
  platform: 'node',
  // Node's loader of ES modules reads every export of each built-in module that is imported, and thereby loads what those
  // only load on demand: a worker would be there 10 ms later.
  format: 'cjs',
  target: 'node20',
  minifySyntax: true,
  minifyWhitespace: true,
  legalComments: 'none',
  define: { 'import.meta.url': '__url' },
  banner: { js: "const __url=require('node:url').pathToFileURL(__filename).href;" },
  logLevel: 'warning',
});

// require('koffi') finds node_modules/koffi.node beside the bundle (Node's resolution tries that extension), so none of
// koffi's JavaScript, which looks for the addon in a dozen places, is part of the image.
const require = createRequire(import.meta.url);
const platform = `linux-${process.arch}`;
const addon = join(
  dirname(require.resolve(`@koromix/koffi-${platform}`)),
  `linux_${process.arch}`,
  'koffi.node',
);
mkdirSync(`${bundle}/node_modules`, { recursive: true });
copyFileSync(addon, `${bundle}/node_modules/koffi.node`);

const { version } = JSON.parse(readFileSync(`${root}package.json`, 'utf8'));
function writeManifest(name, program, libraries, ...nodeArguments) {
  const manifest = {
    format: 1,
    // A supervisor goes on with the worker of its own version when another one is installed under it.
    version,
    // `source` is relative to this file, `target` is the path inside of an isolated worker.
    files: [
      { name: program, source: program, target: `/app/${program}` },
      { name: 'koffi.node', source: 'node_modules/koffi.node', target: '/app/node_modules/koffi.node' },
    ],
    // Loaded by these names while the program starts, beside what the interpreter is linked with.
    libraries,
    // The interpreter's arguments before the path of the program.
    nodeArguments: ['--max-semi-space-size=1', '--max-old-space-size=64', '--no-warnings', ...nodeArguments],
    main: program,
    environment: { MALLOC_ARENA_MAX: '1' },
  };
  writeFileSync(`${bundle}/${name}`, `${JSON.stringify(manifest, null, 2)}\n`);
}
// See vtpmd/src/worker/optimiser.ts, and rehearsal.ts beside it. What is rehearsed runs three times, and V8 has inline caches
// for a function when it has run about eight times, or from the first call on. Nor does it keep the code of what has not run for
// some collections, and a worker may wait for a guest for hours.
const worker = [
  ['libc.so.6', 'libtpms.so.0'],
  '--max-optimized-bytecode-size=0',
  '--no-lazy-feedback-allocation',
  '--no-flush-bytecode',
  '--expose-gc',
];
writeManifest('image.json', 'vtpmd.cjs', ...worker);
writeManifest('vm-guest.json', 'vm-guest.cjs', ...worker);
writeManifest('vm-relay.json', 'vm-relay.cjs', ['libc.so.6']);
