import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createConnection } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { cleanEnvironment, Installation, REPOSITORY } from './installation.js';
import { TOOL_LINES } from './tool-lines.js';
import { TpmClient } from './tpm-client.js';
import { flushContext, getHandles, handlesOf } from './tpm-commands.js';

const TRANSIENT = 0x80000000;
const LOADED_SESSIONS = 0x02000000;
const FRONTEND = join(REPOSITORY, 'frontend-driver/bin/vtpm-frontend.js');

/** A way that leads to a vTPM. */
export interface Way {
  readonly name: string;
  readonly doors: string;
  /** Of the vTPM with that name. */
  tcti(vtpm: string, installation: Installation): Promise<string>;
  /** What a tool leaves loaded is flushed when it is gone. */
  readonly flushes: boolean;
  /** A kind of door, and not a bridge to one. */
  readonly isDoor: boolean;
}

export const WAYS: readonly Way[] = [
  {
    name: 'tcti.sock, by the swtpm TCTI',
    doors: 'tpm,tcti',
    tcti: async (vtpm, installation) => `swtpm:path=${installation.door(vtpm, 'tcti')}`,
    flushes: true,
    isDoor: true,
  },
  {
    name: 'vtpm-frontend stdio, by the cmd TCTI',
    doors: 'tpm',
    tcti: async (vtpm, installation) =>
      `cmd:${process.execPath} ${FRONTEND} stdio ${installation.door(vtpm)}`,
    flushes: false,
    isDoor: false,
  },
  {
    name: 'the mssim ports, by the mssim TCTI',
    doors: 'tpm,mssim',
    tcti: async (vtpm, installation) => {
      const { body } = await installation.supervisord('GET', `/vtpms/${vtpm}`);
      return `mssim:host=127.0.0.1,port=${(body.sockets as { mssim: number }).mssim}`;
    },
    flushes: false,
    isDoor: true,
  },
  {
    name: 'tpm.sock, by socat behind the cmd TCTI',
    doors: 'tpm',
    tcti: async (vtpm, installation) => `cmd:socat - UNIX-CONNECT:${installation.door(vtpm)}`,
    flushes: false,
    isDoor: false,
  },
];

/** Unmodified tpm2-tools and TSS: the same lines by every way. @param work a directory for their files */
async function allToolsThrough(way: Way, installation: Installation, work: string): Promise<void> {
  const vtpm = `way${WAYS.indexOf(way)}`;
  const directory = join(work, vtpm);
  mkdirSync(directory);
  const file = (name: string) => readFileSync(join(directory, name));
  writeFileSync(join(directory, 'message'), 'hello');
  writeFileSync(join(directory, 'block'), '0123456789abcdef');
  await installation.vtpm(vtpm, '--doors', way.doors);
  const env = cleanEnvironment({
    TPM2TOOLS_TCTI: await way.tcti(vtpm, installation),
    TSS2_LOG: 'all+none',
  });
  const said = new Map<string, string>();
  const raw = new TpmClient(createConnection(installation.door(vtpm)));
  for (const line of TOOL_LINES) {
    const [program = '', ...parameters] = line.split(' ');
    await new Promise<void>((resolve) => {
      execFile(program, parameters, { cwd: directory, env }, (error, stdout, stderr) => {
        assert.equal(error, null, `${line}: ${stderr}`);
        said.set(program, stdout);
        resolve();
      });
    });
    if (!way.flushes) await sweep(raw);
  }
  raw.close();
  assert.match(said.get('tpm2_getrandom') ?? '', /^[0-9a-f]{16}$/);
  assert.equal(said.get('tpm2_unseal'), 'hello');
  assert.equal(said.get('tpm2_nvread'), '0123456789abcdef');
  assert.deepEqual(file('rsa.decrypted'), file('block'));
  assert.deepEqual(file('z'), file('secret'));
}

/** What a resource manager would do between two tools. */
async function sweep(client: TpmClient): Promise<void> {
  for (const first of [TRANSIENT, LOADED_SESSIONS]) {
    const handles = handlesOf(await client.transmit(getHandles(first)));
    for (const handle of handles) await client.transmit(flushContext(handle));
  }
}

/** A test for each of these ways in the suite that calls it, all of one installation. */
export function itWorksThrough(ways: readonly Way[]): void {
  let installation: Installation;
  let work: string;

  before(async () => {
    work = mkdtempSync(join(tmpdir(), 'vtpm-ways-'));
    installation = await Installation.create({ tpm: 'embedded' });
    await installation.start();
  });
  after(async () => {
    await installation?.destroy();
    rmSync(work, { recursive: true, force: true });
  });

  for (const way of ways) {
    it(`work through ${way.name}`, () => allToolsThrough(way, installation, work));
  }
}
