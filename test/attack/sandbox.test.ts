import assert from 'node:assert/strict';
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { Outcomes, Targets } from '../support/escape-attempts.js';
import { buildFaultyWorker } from '../support/faulty-worker.js';
import { Installation } from '../support/installation.js';
import { until } from '../support/until.js';

interface Report {
  attempts: Outcomes;
  more: Outcomes;
  descriptors: string[];
  environment: Record<string, string>;
  hog: { mib: number };
  bomb: { made: number; end: string };
}

/**
 * A worker that a guest has taken over, after the moment from which guests are heard. Each attempt is shown to succeed with
 * the same code in a worker without isolation.
 */
describe('attack: out of a worker', function () {
  this.timeout(120_000);
  let installation: Installation;
  let directory: string;

  before(async () => {
    installation = await Installation.create();
    directory = mkdtempSync(join(tmpdir(), 'vtpm-hostile-'));
    await installation.start();
  });
  after(async () => {
    await installation?.destroy();
    rmSync(directory, { recursive: true, force: true });
  });

  /** A supervisor whose workers are hostile. */
  async function turnHostile(...args: string[]): Promise<void> {
    const { paths } = installation;
    const targets: Targets = {
      files: {
        'the toolstack key': paths.toolstack.key,
        "the supervisor's key": paths.supervisor.delegateKey,
      },
      newFile: join(directory, 'made-by-a-worker'),
      socket: paths.manager.adminSocket,
      processes: { 'the manager': installation.manager?.pid ?? -1, 'another program': process.pid },
    };
    const code = fileURLToPath(new URL('../support/escape-attempts.js', import.meta.url));
    const prelude = `import { turnHostile } from ${JSON.stringify(code)}; turnHostile(${JSON.stringify(targets)});`;
    const manifest = await buildFaultyWorker(join(directory, 'image'), prelude);
    await installation.killSupervisor();
    await installation.startSupervisor({ args: ['--worker-manifest', manifest, '--pool-max', '0', ...args] });
  }

  function reports(name: string): Partial<Report>[] {
    return readFileSync(join(installation.paths.log, `vtpm-${name}.log`), 'utf8')
      .split('\n')
      .filter((line) => line.includes('"msg":"report"'))
      .map((line) => JSON.parse(line) as Partial<Report>);
  }

  async function report<K extends keyof Report>(name: string, key: K): Promise<Report[K]> {
    const found = await until(`the worker reports ${key}`, () => reports(name).findLast((one) => one[key]));
    return found[key] as Report[K];
  }

  async function layers(name: string): Promise<string[]> {
    const shown = await installation.ctlJson('show', name);
    return (shown.worker as { layers: string[] }).layers;
  }

  describe('in the sandbox', () => {
    before(async () => {
      await turnHostile();
      await installation.vtpm('locked');
    });

    it('gets EPERM for a file, a socket, a program, a process, a namespace, and to be traced', async () => {
      const attempts = await report('locked', 'attempts');
      assert.ok(Object.keys(attempts).length > 30);
      for (const [name, outcome] of Object.entries(attempts)) {
        assert.equal(outcome, name.includes('clone3') ? 'ENOSYS' : 'EPERM', name);
      }
    });

    it('has no way back to a privilege, a limit or a life without filters', async () => {
      for (const [name, outcome] of Object.entries(await report('locked', 'more'))) {
        assert.equal(outcome, 'EPERM', name);
      }
      const pid = await installation.workerPid('locked');
      const status = readFileSync(`/proc/${pid}/status`, 'utf8');
      assert.match(status, /^NoNewPrivs:\t1$/m);
      for (const set of ['Inh', 'Prm', 'Eff', 'Bnd', 'Amb'])
        assert.match(status, new RegExp(`^Cap${set}:\t0+$`, 'm'));
      // Every thread: one without the filter would be the way around it.
      for (const thread of readdirSync(`/proc/${pid}/task`)) {
        assert.equal(filters(`/proc/${pid}/task/${thread}/status`), filters('/proc/self/status') + 2, thread);
      }
    });

    it('has an empty environment, and no descriptor of a file', async () => {
      assert.deepEqual(await report('locked', 'environment'), { MALLOC_ARENA_MAX: '1', PWD: '/' });
      assert.deepEqual(await report('locked', 'descriptors'), ['device', 'event loop', 'pipe', 'socket']);
    });

    it('makes no thread, and is ended where it takes more memory than it may have', async () => {
      const pid = await installation.workerPid('locked');
      process.kill(pid, 'SIGWINCH');
      assert.deepEqual(await report('locked', 'bomb'), { made: 0, end: 'EPERM' });
      process.kill(pid, 'SIGUSR2');
      // Ended by the limit of its cgroup; without one, left with what its own limit of memory gave.
      await until('the worker has taken what there was', () => {
        const { hog } = reports('locked').findLast((one) => one.hog) ?? {};
        if (hog) assert.ok(hog.mib <= 768, `${hog.mib} MiB`);
        return hog !== undefined || !existsSync(`/proc/${pid}`) ? true : undefined;
      });
    });
  });

  describe('in the sandbox without its filters, which was waived by name', () => {
    before(async () => {
      await turnHostile('--waive-layers', waivedHere('seccomp:start', 'seccomp:serve'));
      await installation.vtpm('unfiltered');
    });

    it('sees no file, socket or process of the host all the same', async () => {
      const attempts = await report('unfiltered', 'attempts');
      for (const [name, outcome] of Object.entries(attempts)) {
        if (/^open the|connect to/.test(name)) assert.equal(outcome, 'ENOENT', name);
        else if (/^signal (the|another)/.test(name)) assert.equal(outcome, 'ESRCH', name);
        else if (name === 'create a file') assert.equal(outcome, 'ENOENT', name);
        else if (/namespace/.test(name)) assert.equal(outcome, 'ENOSPC', name);
        else if (name === 'execute a program') assert.equal(outcome, 'ENOENT', name);
      }
      // What the filters alone had stopped.
      assert.equal(attempts['make a unix socket'], 'ok');
      assert.equal(attempts['make a process'], 'ok');
      const more = await report('unfiltered', 'more');
      for (const name of ['take capabilities', 'raise a limit', 'set uid 0', 'allow new privileges']) {
        assert.notEqual(more[name], 'ok', name);
      }
      assert.deepEqual(
        (await layers('unfiltered')).filter((layer) => layer.startsWith('seccomp')),
        [],
      );
    });

    it('runs into the limit of processes and threads', async () => {
      process.kill(await installation.workerPid('unfiltered'), 'SIGWINCH');
      const { made, end } = await report('unfiltered', 'bomb');
      const isLimited = (await layers('unfiltered')).some(
        (layer) => layer === 'uid' || layer === 'cgroup:pids',
      );
      if (isLimited) assert.ok(end === 'EAGAIN' && made < 64, `${made} threads, then ${end}`);
      else assert.equal(process.getuid?.() === 0, false, 'root has at least one of the two');
    });
  });

  describe('with isolation none (positive control)', () => {
    before(async () => {
      await turnHostile();
      await installation.vtpm('open', '--isolation', 'none');
    });

    it('succeeds with each of it', async () => {
      for (const [name, outcome] of Object.entries(await report('open', 'attempts'))) {
        assert.equal(outcome, 'ok', name);
      }
      const environment = await report('open', 'environment');
      assert.equal(environment.MALLOC_ARENA_MAX, '1');
      assert.ok((await report('open', 'descriptors')).includes('file'));
    });

    it('makes hundreds of threads, and takes a gigabyte', async () => {
      const pid = await installation.workerPid('open');
      process.kill(pid, 'SIGWINCH');
      assert.deepEqual(await report('open', 'bomb'), { made: 400, end: 'ok' });
      process.kill(pid, 'SIGUSR2');
      assert.deepEqual(await report('open', 'hog'), { mib: 1024 });
    });
  });
});

function filters(path: string): number {
  return Number(/^Seccomp_filters:\t(\d+)$/m.exec(readFileSync(path, 'utf8'))?.[1]);
}

/** With what this machine cannot give: a flag takes the place of the environment. */
function waivedHere(...names: string[]): string {
  return [...names, ...(process.env.VTPM_WAIVE_LAYERS ?? '').split(',')].filter(Boolean).join(',');
}
