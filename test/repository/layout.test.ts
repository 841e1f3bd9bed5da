import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('../../..', import.meta.url));
const read = (path: string) => readFileSync(join(root, path), 'utf8');
const tracked = execFileSync('git', ['-C', root, 'ls-files'], { encoding: 'utf8' })
  .split('\n')
  .filter(Boolean);

/** Which packages of the project each one may import. */
const MAY_IMPORT: Record<string, string[]> = {
  common: [],
  proto: [],
  'tpm2-ts-bindings': [],
  'tpm2-ts-bindings/examples': ['tpm2-ts-bindings'],
  'frontend-driver': [],
  vtpmd: ['vtpm-common', 'vtpm-proto'],
  manager: ['vtpm-common', 'vtpm-proto', 'tpm2-ts-bindings'],
  toolstack: ['vtpm-common', 'vtpm-proto', 'tpm2-ts-bindings', 'vtpm-frontend-driver'],
};
const OURS = [
  'vtpm-common',
  'vtpm-proto',
  'tpm2-ts-bindings',
  'vtpm-frontend-driver',
  'vtpmd',
  'vtpm-manager',
  'vtpm-toolstack',
];

describe('the repository', () => {
  it('resolves tpm2-ts-bindings to the private workspace package', () => {
    const lock = JSON.parse(read('package-lock.json')) as {
      packages: Record<string, { resolved?: string; link?: boolean }>;
    };
    assert.deepEqual(lock.packages['node_modules/tpm2-ts-bindings'], {
      resolved: 'tpm2-ts-bindings',
      link: true,
    });
    assert.equal((JSON.parse(read('tpm2-ts-bindings/package.json')) as { private: boolean }).private, true);
  });

  it('names no registry host in its lock file', () => {
    assert.doesNotMatch(read('package-lock.json'), /"resolved": "https?:/);
  });

  it("locks every platform's optional packages: without one `npm ci` refuses the whole lock file", () => {
    const lock = JSON.parse(read('package-lock.json')) as {
      packages: Record<string, { optional?: boolean; optionalDependencies?: Record<string, string> }>;
    };
    for (const [path, { optional, optionalDependencies = {} }] of Object.entries(lock.packages)) {
      // Below an optional package npm asks for nothing.
      if (optional) continue;
      for (const name of Object.keys(optionalDependencies)) {
        const places = [`${path}/node_modules/${name}`, `node_modules/${name}`];
        assert.ok(
          places.some((place) => place in lock.packages),
          `${path} names ${name}, which has no entry`,
        );
      }
    }
  });

  it('has imports that run one way', () => {
    for (const file of tracked.filter((name) => name.endsWith('.ts'))) {
      const allowed = MAY_IMPORT[dirname(file)] ?? MAY_IMPORT[file.split('/')[0] ?? ''];
      if (!allowed) continue;
      for (const [, name] of read(file).matchAll(/(?:from|import\()\s*'([^']+)'/g)) {
        const packageName = name?.split('/')[0] ?? '';
        if (OURS.includes(packageName))
          assert.ok(allowed.includes(packageName), `${file} imports ${packageName}`);
      }
    }
  });

  it('gives tpm2-ts-bindings no run-time dependency', () => {
    assert.equal(
      (JSON.parse(read('tpm2-ts-bindings/package.json')) as { dependencies?: object }).dependencies,
      undefined,
    );
  });
});
