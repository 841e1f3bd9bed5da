import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { cpSync, mkdirSync, mkdtempSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { delimiter, join } from 'node:path';
import { promisify } from 'node:util';
import { type Finished, REPOSITORY, run } from '../support/installation.js';
import { type Swtpm, startSwtpm } from '../support/swtpm.js';

interface Step {
  readonly kind: 'sh' | 'text' | 'test';
  readonly body: string;
  readonly line: number;
}

const PAGE = readFileSync(join(REPOSITORY, 'docs/operations.md'), 'utf8');

/** The page's chapters, each with its blocks and what the test does between them. What is before the first is ''. */
function chaptersOf(page: string): Map<string, Step[]> {
  const chapters = new Map<string, Step[]>([['', []]]);
  const lineOf = (index: number) => page.slice(0, index).split('\n').length;
  let steps: Step[] = [];
  for (const match of page.matchAll(/^## (.*)$|^```(sh|text)\n([\s\S]*?)^```$|^<!-- test: (.*) -->$/gm)) {
    const [, title, kind, body = '', marker] = match;
    if (title !== undefined) {
      steps = [];
      chapters.set(title, steps);
    } else if (marker !== undefined) {
      steps.push({ kind: 'test', body: marker, line: lineOf(match.index) });
    } else if (chapters.size === 1) {
      chapters.get('')?.push({ kind: kind as 'sh', body, line: lineOf(match.index) });
    } else {
      steps.push({ kind: kind as 'sh' | 'text', body, line: lineOf(match.index) });
    }
  }
  return chapters;
}

/** A host that is operated by the page: its TPM, its disk, and the operator's medium. */
class Host {
  readonly directory = mkdtempSync(join(tmpdir(), 'vtpm-op-'));
  readonly home = join(this.directory, 'h');
  readonly away = join(this.directory, 'away');
  readonly #programs = join(this.directory, 'bin');
  readonly #lost = join(this.directory, 'lost');

  private constructor(private readonly tpm: Swtpm) {
    mkdirSync(this.away);
    mkdirSync(this.#programs);
    const program = join(REPOSITORY, 'toolstack/bin/vtpmctl.js');
    writeFileSync(join(this.#programs, 'vtpmctl'), `#!/bin/sh\nexec ${process.execPath} ${program} "$@"\n`, {
      mode: 0o755,
    });
  }

  static async boot(): Promise<Host> {
    return new Host(await startSwtpm());
  }

  /** Runs a block as an operator's shell does, from its first failure on nothing more. */
  shell(block: string): Promise<Finished> {
    return run('bash', ['-e', '-o', 'pipefail', '-c', block], {
      PATH: `${this.#programs}${delimiter}${process.env.PATH}`,
      VTPM_HOME: this.home,
      TPM: `unix:${this.tpm.socket}`,
      AWAY: this.away,
    });
  }

  /** What no command does: each is a marker on the page. */
  readonly happenings: Readonly<Record<string, () => Promise<void>>> = {
    'the new PCR 0 is known': async () => {
      // As on the spare machine: what a TPM has after the same measurement.
      const spare = await startSwtpm();
      try {
        await tools(spare, 'tpm2_pcrextend', measured('5'));
        const text = await tools(spare, 'tpm2_pcrread', 'sha256:0');
        const value = /0x([0-9A-F]{64})/.exec(text)?.[1]?.toLowerCase();
        assert.ok(value);
        writeFileSync(join(this.away, 'pcr0.txt'), `${value}\n`);
      } finally {
        await spare.stop();
      }
    },
    'reboot with the new firmware': () => this.#reboot('5'),
    'reboot with unknown firmware': () => this.#reboot('6'),
    'the disk is lost': async () => {
      await this.#powerOff();
      renameSync(this.home, this.#lost);
    },
    'the old disk is put back': async () => {
      await this.#powerOff();
      rmSync(this.home, { recursive: true });
      cpSync(this.#lost, this.home, { recursive: true });
    },
    'another TPM': async () => {
      await this.#powerOff();
      await this.tpm.kill();
      for (const file of ['tpm2-00.permall', '.lock'])
        rmSync(join(this.tpm.directory, file), { force: true });
      await this.tpm.restart();
      await tools(this.tpm, 'tpm2_pcrextend', measured('6'));
    },
  };

  async destroy(): Promise<void> {
    await this.#powerOff();
    await this.tpm.stop();
    rmSync(this.directory, { recursive: true, force: true });
  }

  async #reboot(firmware: string): Promise<void> {
    await this.#powerOff();
    await this.tpm.restart();
    await tools(this.tpm, 'tpm2_pcrextend', measured(firmware));
  }

  async #powerOff(): Promise<void> {
    await this.shell('vtpmctl down');
  }
}

const measured = (digit: string): string => `0:sha256=${digit.repeat(64)}`;

async function tools(tpm: Swtpm, program: string, ...args: string[]): Promise<string> {
  const env = { ...process.env, TPM2TOOLS_TCTI: `swtpm:path=${tpm.socket}`, TSS2_LOG: 'all+NONE' };
  return (await promisify(execFile)(program, args, { env })).stdout;
}

/** Each line that the page shows is one of the output, in this order; `…` is anything. */
function assertShown(shown: string, output: string, at: string): void {
  const lines = output.split('\n').map((line) => line.trimEnd());
  let from = 0;
  for (const line of shown.trimEnd().split('\n')) {
    const pattern = new RegExp(
      `^${line
        .split('…')
        .map((part) => part.replace(/[.*+?^${}()|[\]\\]/g, '\\$&'))
        .join('.*')}$`,
    );
    const found = lines.findIndex((candidate, index) => index >= from && pattern.test(candidate));
    assert.ok(found >= 0, `${at}: "${line}" is not what was said:\n${output}`);
    from = found + 1;
  }
}

describe('docs/operations.md, each chapter as it stands', function () {
  this.timeout(60_000);
  this.bail(true);
  let host: Host;
  before(async () => {
    host = await Host.boot();
  });
  after(() => host?.destroy());

  const chapters = chaptersOf(PAGE);

  it('has the chapters of an operator, and names what the test puts in place of', () => {
    assert.deepEqual(
      [...chapters.keys()].filter((title) => title !== ''),
      ['Enrolment', 'Firmware update day', 'Restoring after disk loss', 'Losing the TPM', 'Retiring a vTPM'],
    );
    const [settings] = chapters.get('') ?? [];
    assert.match(settings?.body ?? '', /^export TPM=device:\S+ .*\nexport AWAY=\S+ .*\n$/);
  });

  for (const [title, steps] of chapters) {
    if (title === '') continue;
    it(title, async () => {
      let status = 0;
      let output = '';
      for (const { kind, body, line } of steps) {
        const at = `docs/operations.md:${line}`;
        const exit = /^exit (\d)$/.exec(body);
        if (kind === 'text') {
          assertShown(body, output, at);
        } else if (kind === 'sh') {
          const { code, stdout, stderr } = await host.shell(body);
          output = `${stdout}${stderr}`;
          assert.equal(code, status, `${at}: ${output}`);
          status = 0;
        } else if (exit) {
          status = Number(exit[1]);
        } else {
          const happening = host.happenings[body];
          assert.ok(happening, `${at}: the test knows nothing of "${body}"`);
          await happening();
        }
      }
      assert.equal(status, 0, `${title}: the last marker has no commands after it`);
    });
  }
});
