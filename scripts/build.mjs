// Builds everything: message types from the .proto files, TypeScript, then the worker's single-file bundles.
import { execFileSync } from 'node:child_process';
import { rmSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { build } from 'esbuild';

const root = fileURLToPath(new URL('..', import.meta.url));
if (process.argv.includes('--clean')) {
  for (const name of [
    'common',
    'proto',
    'tpm2-ts-bindings',
    'manager',
    'vtpmd',
    'frontend-driver',
    'toolstack',
    'test',
  ]) {
    rmSync(`${root}${name}/dist`, { recursive: true, force: true });
  }
}
await import('./generate-proto.mjs');
execFileSync(
  process.execPath,
  [
    `${root}node_modules/typescript/bin/tsc`,
    '-b',
    ...process.argv.slice(2).filter((a) => !a.startsWith('--')),
  ],
  { cwd: root, stdio: 'inherit' },
);

// The worker opens as few files as it can: one bundle, and koffi's native addon, which the loader is told of by path.
await build({
  entryPoints: {
    vtpmd: `${root}vtpmd/dist/worker-main.js`,
    'vtpm-softtpm': `${root}vtpmd/dist/softtpm-main.js`,
  },
  outdir: `${root}vtpmd/dist/bundle`,
  outExtension: { '.js': '.mjs' },
  bundle: true,
  platform: 'node',
  format: 'esm',
  target: 'node20',
  external: ['koffi'],
  minifySyntax: true,
  minifyWhitespace: true,
  legalComments: 'none',
  banner: { js: "import{createRequire as __cr}from'node:module';const require=__cr(import.meta.url);" },
  logLevel: 'warning',
});
