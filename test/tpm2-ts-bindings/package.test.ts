import assert from 'node:assert/strict';
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createTpm, openSwtpm, readRandom } from 'tpm2-ts-bindings';
import { REPOSITORY, run } from '../support/installation.js';
import { startSwtpm } from '../support/swtpm.js';

const PACKAGE = join(REPOSITORY, 'tpm2-ts-bindings');
const COMPILERS = [
  ['7', join(REPOSITORY, 'node_modules/typescript/bin/tsc')],
  ['5.9', join(PACKAGE, 'node_modules/typescript/bin/tsc')],
] as const;
const RESOLUTIONS = { nodenext: 'nodenext', bundler: 'esnext' } as const;

/** What the fragments of the README take as given. */
const GIVEN = `
import type { X509Certificate } from 'node:crypto';
import type { NvEntity, ObjectEntity, PcrSelection, PolicyStep, Session, Tpm } from 'tpm2-ts-bindings';
declare const tpm: Tpm, session: Session, srk: ObjectEntity, sealed: ObjectEntity, index: NvEntity;
declare const selection: PcrSelection, digest: Buffer, srkName: Buffer, roots: X509Certificate[];
`;

describe('tpm2-ts-bindings: the package', () => {
  let directory: string;
  let project: string;
  let files: string[];
  before(async () => {
    directory = mkdtempSync(join(tmpdir(), 'vtpm-package-'));
    project = join(directory, 'consumer');
    mkdirSync(project);
    writeFileSync(join(project, 'package.json'), '{ "name": "consumer", "private": true, "type": "module" }');
    const packed = await succeed(
      'npm',
      'pack',
      '--json',
      '-w',
      'tpm2-ts-bindings',
      '--pack-destination',
      directory,
    );
    const [{ filename, files: entries }] = JSON.parse(packed) as [
      { filename: string; files: { path: string }[] },
    ];
    files = entries.map(({ path }) => path);
    await succeed('npm', 'install', '--offline', '--prefix', project, join(directory, filename));
  });
  after(() => rmSync(directory, { recursive: true, force: true }));

  async function succeed(program: string, ...args: string[]): Promise<string> {
    const { code, stdout, stderr } = await run(program, args);
    assert.equal(code, 0, `${program} ${args.join(' ')}\n${stdout}${stderr}`);
    return stdout;
  }
  const installed = (...path: string[]) => join(project, 'node_modules', ...path);

  it('holds each module with its types, and nothing that belongs to this repository', () => {
    const modules = readdirSync(join(PACKAGE, 'src'), { recursive: true, encoding: 'utf8' })
      .filter((name) => name.endsWith('.ts'))
      .map((name) => name.slice(0, -3));
    assert.deepEqual(
      files.toSorted(),
      [
        'LICENSE',
        'README.md',
        'package.json',
        ...modules.flatMap((name) => [`dist/${name}.d.ts`, `dist/${name}.js`]),
      ].sort(),
    );
    const manifest = JSON.parse(readFileSync(installed('tpm2-ts-bindings/package.json'), 'utf8')) as {
      exports: { '.': Record<string, string> };
    };
    for (const target of Object.values(manifest.exports['.']))
      assert.ok(files.includes(target.slice(2)), target);
    for (const file of files) {
      const text = readFileSync(installed('tpm2-ts-bindings', file), 'utf8');
      assert.doesNotMatch(text, /sourceMappingURL/, file);
    }
    assert.equal(
      readFileSync(join(PACKAGE, 'LICENSE'), 'utf8'),
      readFileSync(join(REPOSITORY, 'LICENSE'), 'utf8'),
    );
  });

  it('installs offline, with nothing else', () => {
    assert.deepEqual(
      readdirSync(installed()).filter((name) => !name.startsWith('.')),
      ['tpm2-ts-bindings'],
    );
  });

  describe('for a program that uses it', () => {
    before(() => {
      mkdirSync(installed('@types'));
      for (const name of ['@types/node', 'undici-types']) {
        symlinkSync(join(REPOSITORY, 'node_modules', name), installed(name));
      }
      writeFileSync(
        join(project, 'consumer.ts'),
        readFileSync(join(REPOSITORY, 'test/tpm2-ts-bindings/consumer.ts')),
      );
    });

    function configure(resolution: keyof typeof RESOLUTIONS, ...sources: string[]): string {
      const path = join(project, `tsconfig.${resolution}.json`);
      const compilerOptions = {
        ...{ strict: true, skipLibCheck: false, target: 'es2022', outDir: 'out' },
        ...{ module: RESOLUTIONS[resolution], moduleResolution: resolution },
      };
      writeFileSync(path, JSON.stringify({ compilerOptions, files: sources }));
      return path;
    }

    for (const [version, compiler] of COMPILERS) {
      for (const resolution of ['nodenext', 'bundler'] as const) {
        it(`type-checks under TypeScript ${version}, ${resolution}: every misuse is refused`, async () => {
          assert.ok(
            (await succeed(process.execPath, compiler, '--version')).startsWith(`Version ${version}.`),
          );
          await succeed(process.execPath, compiler, '-p', configure(resolution, 'consumer.ts'));
        });
      }
    }

    it('runs', async () => {
      await succeed(process.execPath, COMPILERS[0][1], '-p', configure('nodenext', 'consumer.ts'));
      const swtpm = await startSwtpm();
      try {
        assert.equal(
          await succeed(process.execPath, join(project, 'out/consumer.js'), swtpm.socket),
          '000600800043\n8\n',
        );
      } finally {
        await swtpm.stop();
      }
    });

    it('and so does the swtpm that its README starts', async () => {
      const readme = readFileSync(installed('tpm2-ts-bindings', 'README.md'), 'utf8');
      const [, start = ''] = /```sh\n(mkdir tpm\n.*?)```/s.exec(readme) ?? [];
      await succeed('sh', '-c', `cd '${project}' && ${start}`);
      const at = (name: string) => ({ path: join(project, 'tpm', name) });
      const swtpm = await openSwtpm({ data: at('socket'), control: at('control') });
      try {
        assert.equal((await readRandom(createTpm(swtpm), 8)).length, 8);
      } finally {
        await swtpm.shutdown();
      }
    });

    it('and the fragments in its README type-check', async () => {
      const readme = readFileSync(installed('tpm2-ts-bindings', 'README.md'), 'utf8');
      const blocks = [...readme.matchAll(/^```ts\n(.*?)^```$/gms)].map(([, block = '']) => block);
      const fragments = blocks.filter((block) => !block.includes("from 'tpm2-ts-bindings'"));
      assert.ok(fragments.length > 0);
      const names = Object.keys(await import('tpm2-ts-bindings'));
      const sources = fragments.map((fragment, at) => {
        const name = `fragment-${at}.ts`;
        const used = names.filter((each) => new RegExp(`\\b${each}\\b`).test(fragment));
        writeFileSync(
          join(project, name),
          `import { ${used.join(', ')} } from 'tpm2-ts-bindings';${GIVEN}{\n${fragment}}\n`,
        );
        return name;
      });
      await succeed(process.execPath, COMPILERS[0][1], '-p', configure('nodenext', ...sources));
    });
  });

  it('has an API reference without a warning', async () => {
    const out = join(directory, 'api');
    await succeed(
      process.execPath,
      join(PACKAGE, 'node_modules/typedoc/bin/typedoc'),
      '--options',
      PACKAGE,
      '--out',
      out,
    );
    assert.ok(existsSync(join(out, 'functions/openTpm.html')));
  });
});
