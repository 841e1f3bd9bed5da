// Builds everything: message types from the .proto files, TypeScript, then the single-file bundles of the worker and the programs.
import { execFileSync } from 'node:child_process';
import { rmSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('..', import.meta.url));
if (process.argv.includes('--clean')) {
  for (const name of [
    'common',
    'proto',
    'tpm2-ts-bindings',
    'tpm2-ts-bindings/examples',
    'manager',
    'vtpmd',
    'frontend-driver',
    'toolstack',
    'quickstart',
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

await import('./bundle-worker.mjs');
await import('./bundle-programs.mjs');
