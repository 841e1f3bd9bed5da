import { execFileSync, spawnSync } from 'node:child_process';
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { transformSync } from 'esbuild';
import { cleanEnvironment, REPOSITORY } from '../support/installation.js';
import type { Mutant } from './mutants.js';

export interface Verdict {
  readonly passes: number;
  readonly failures: number;
  /** Milliseconds */
  readonly duration: number;
  /** What mocha printed, for the message of a test that fails. */
  readonly output: string;
}

/** History, and what is made of the build. */
const NOT_COPIED = ['.git', '.build'];

/** What scripts/bundle-worker.mjs makes the worker's images of; the programs are made of all. */
const IN_WORKER = ['vtpmd/', 'common/', 'proto/'];

const TIMEOUT_MS = 60_000;
/** Without its guard a test may wait for what never comes: as many times as long as with it, and this at least. */
const LONGER = 5;
const LEAST_TIMEOUT_MS = 10_000;

/** A copy of the repository in which guards are removed, one at a time. */
export class Workshop {
  readonly #directory = mkdtempSync(join(tmpdir(), 'vtpm-mutants-'));
  /** What the tests said in the copy as it is: several guards may have the same test. */
  readonly #controls = new Map<string, Verdict>();

  constructor() {
    const parts = readdirSync(REPOSITORY).filter((name) => !NOT_COPIED.includes(name));
    // With its links as they are: the packages of the workspace must be the copies. What is built is copied too.
    execFileSync('cp', ['-a', ...parts.map((name) => join(REPOSITORY, name)), this.#directory]);
  }

  /** The mutant's test in the copy as it is: it must pass. */
  control(mutant: Mutant): Verdict {
    const key = `${mutant.test.file}\0${mutant.test.name}`;
    const known = this.#controls.get(key) ?? this.#run(mutant, TIMEOUT_MS);
    this.#controls.set(key, known);
    return known;
  }

  /** The mutant's test without the guard: it must fail. */
  try(mutant: Mutant): Verdict {
    const { duration } = this.control(mutant);
    const timeoutMs = Math.min(TIMEOUT_MS, Math.max(LEAST_TIMEOUT_MS, LONGER * duration));
    const source = readFileSync(join(this.#directory, mutant.file), 'utf8');
    const path = join(this.#directory, mutant.file.replace('/src/', '/dist/').replace(/\.ts$/, '.js'));
    const original = readFileSync(path, 'utf8');
    // Not checked: without its guard a name may be unused.
    writeFileSync(path, transformSync(mutate(source, mutant), { loader: 'ts', target: 'node20' }).code);
    try {
      this.#bundle(mutant);
      return this.#run(mutant, timeoutMs, ['--bail']);
    } finally {
      writeFileSync(path, original);
      this.#bundle(mutant);
    }
  }

  close(): void {
    rmSync(this.#directory, { recursive: true, force: true });
  }

  #bundle({ file }: Mutant): void {
    if (IN_WORKER.some((folder) => file.startsWith(folder))) this.#runScript('scripts/bundle-worker.mjs');
    this.#runScript('scripts/bundle-programs.mjs');
  }

  #runScript(script: string): void {
    const built = spawnSync(process.execPath, [script], {
      cwd: this.#directory,
      env: cleanEnvironment(),
      encoding: 'utf8',
    });
    if (built.status !== 0)
      throw new Error(`the mutated copy does not build:\n${built.stdout}${built.stderr}`);
  }

  #run(mutant: Mutant, timeoutMs: number, more: readonly string[] = []): Verdict {
    const report = join(this.#directory, 'report.json');
    rmSync(report, { force: true });
    const ran = spawnSync(
      process.execPath,
      [
        'node_modules/mocha/bin/mocha.js',
        '--no-config',
        ...['--timeout', String(timeoutMs), '--exit'],
        ...['--reporter', 'scripts/mocha-reporter.cjs'],
        ...['--spec', `test/dist/${mutant.test.file}.test.js`],
        ...['--fgrep', mutant.test.name],
        ...more,
      ],
      {
        cwd: this.#directory,
        env: cleanEnvironment({ VTPM_TEST_REPORT: report }),
        encoding: 'utf8',
        timeout: 300_000,
      },
    );
    const counts = JSON.parse(readFileSync(report, 'utf8')) as Omit<Verdict, 'output'>;
    return { ...counts, output: ran.stdout + ran.stderr };
  }
}

/** @throws Error where the guard is not found exactly once: the code changed and the mutant must follow */
export function mutate(source: string, mutant: Mutant): string {
  const parts = source.split(mutant.guard);
  if (parts.length !== 2) {
    throw new Error(
      `${mutant.file}: the guard of "${mutant.name}" is there ${parts.length - 1} times, not once`,
    );
  }
  return parts.join(mutant.without);
}
