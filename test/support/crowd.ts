import assert from 'node:assert/strict';
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { createConnection } from 'node:net';
import { join } from 'node:path';
import { setTimeout as delay, setImmediate } from 'node:timers/promises';
import { inParallel } from 'vtpm-toolstack/supervisor/in-parallel';
import { OwnStarts } from '../bench/own-starts.js';
import { family, pageTableMiB, privateMiB } from '../bench/process-figures.js';
import type { Installation } from './installation.js';
import { TpmClient } from './tpm-client.js';
import { getRandom } from './tpm-commands.js';

export interface CrowdFigures {
  /** Milliseconds from the first request until the last one has answered a command. */
  readonly upMs: number;
  /** MiB that only the workers and their sandboxes hold, page tables included: of all, and of the middle one. */
  readonly totalMiB: number;
  readonly eachMiB: number;
}

/** Side by side: more starts only share the processors. */
const LANES = 4;
const STOP_LANES = 32;
const CGROUPS = '/sys/fs/cgroup';

/**
 * Brings up so many new vTPMs at once, each of which answers and is listed, and stops them all.
 * @throws AssertionError where one is missing, or something is left behind: a process, mount, cgroup or socket
 */
export async function liveInACrowd(installation: Installation, count: number): Promise<CrowdFigures> {
  const starts = new OwnStarts(installation);
  const supervisor = installation.supervisor?.pid ?? 0;
  const before = { processes: family(supervisor).length, mounts: mountsOf(supervisor) };
  const names: string[] = [];
  for (let made = 0; made < count; made++) {
    names.push(await starts.register(`crowd-${made}`));
    // The registration blocks this process, whose other connections are to hear of their ends.
    await setImmediate();
  }
  const begin = performance.now();
  await inParallel(LANES, names, async (name) => {
    const { status, body } = await installation.supervisord('POST', `/vtpms/${name}/start`);
    assert.equal(status, 200, JSON.stringify(body));
    await use(installation, name);
  });
  const upMs = performance.now() - begin;
  const { body } = await installation.supervisord('GET', '/vtpms');
  const listed = body.vtpms as { name: string; state: string; worker: { pid: number } }[];
  assert.equal(listed.filter(({ state }) => state === 'running').length, count);
  assert.equal(new Set(listed.map(({ worker }) => worker.pid)).size, count);
  // All of them still do, when all are there.
  await inParallel(STOP_LANES, names, (name) => use(installation, name));
  const all = family(supervisor).slice(1);
  assert.ok(cgroupsOf(supervisor).length === 0 || cgroupsOf(supervisor).length >= count);
  const own = (pid: number): number => privateMiB(pid) + pageTableMiB(pid);
  const totalMiB = all.reduce((sum, pid) => sum + own(pid), 0);
  await inParallel(STOP_LANES, names, async (name) => {
    const { body: stopped } = await installation.supervisord('POST', `/vtpms/${name}/stop`);
    assert.deepEqual([stopped.state, stopped.reason], ['stopped', null]);
  });
  // Groups are removed when the kernel has let go of the last process.
  for (let left = 500; cgroupsOf(supervisor).length > 0 && left > 0; left--) await delay(20);
  assert.deepEqual(cgroupsOf(supervisor), []);
  assert.equal(family(supervisor).length, before.processes);
  assert.equal(mountsOf(supervisor), before.mounts);
  for (const name of names) assert.ok(!existsSync(join(installation.paths.supervisor.doors, name)));
  return { upMs, totalMiB, eachMiB: totalMiB / count };
}

async function use(installation: Installation, name: string): Promise<void> {
  const client = new TpmClient(createConnection(installation.door(name)));
  try {
    assert.equal((await client.transmit(getRandom())).readUInt32BE(6), 0);
  } finally {
    client.close();
  }
}

/** The groups of a supervisor's workers, whichever hierarchy they are in. */
function cgroupsOf(supervisor: number, directory = CGROUPS): string[] {
  if (!existsSync(directory)) return [];
  return readdirSync(directory, { withFileTypes: true })
    .filter((item) => item.isDirectory())
    .flatMap(({ name }) =>
      name.startsWith(`vtpm-${supervisor}-`)
        ? [join(directory, name)]
        : cgroupsOf(supervisor, join(directory, name)),
    );
}

function mountsOf(pid: number): number {
  return readFileSync(`/proc/${pid}/mountinfo`, 'utf8').split('\n').length;
}
