import { copyFileSync, mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { build } from 'esbuild';
import { REPOSITORY } from './installation.js';

/** Where a worker that leaves no checkpoints can be killed: names of `barrier` calls in its source. */
export const WORKER_BARRIERS = ['before-process', 'after-process', 'after-ack'] as const;

/**
 * Source of a program's prelude: the process kills itself the `count`th time it comes to `barrier`. A worker's filter
 * takes kill(2) away and leaves abort(), which ends it as suddenly: no handler and no destructor runs.
 */
export function killAt(barrier: string, count: number): string {
  return `let left = ${count};
globalThis[Symbol.for('vtpm.barrier')] = (name) => {
  if (name === ${JSON.stringify(barrier)} && --left === 0) {
    try { process.kill(process.pid, 'SIGKILL'); } catch { process.abort(); }
  }
};`;
}

/**
 * A worker image like the product's, but with a prelude that runs before everything else.
 * @returns the path of its manifest
 */
export async function buildFaultyWorker(directory: string, prelude: string): Promise<string> {
  const product = join(REPOSITORY, 'vtpmd/dist/bundle');
  mkdirSync(join(directory, 'node_modules'), { recursive: true });
  writeFileSync(join(directory, 'prelude.mjs'), prelude);
  copyFileSync(join(product, 'image.json'), join(directory, 'image.json'));
  copyFileSync(join(product, 'node_modules/koffi.node'), join(directory, 'node_modules/koffi.node'));
  await build({
    stdin: {
      contents: `import './prelude.mjs';\nimport ${JSON.stringify(join(product, 'vtpmd.cjs'))};`,
      resolveDir: directory,
    },
    outfile: join(directory, 'vtpmd.cjs'),
    bundle: true,
    platform: 'node',
    format: 'cjs',
    target: 'node20',
    // As in scripts/bundle-worker.mjs.
    define: { 'import.meta.url': '__url' },
    banner: { js: "const __url=require('node:url').pathToFileURL(__filename).href;" },
    logLevel: 'warning',
  });
  return join(directory, 'image.json');
}
