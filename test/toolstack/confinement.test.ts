import assert from 'node:assert/strict';
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmdirSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import type { ToolstackError } from 'vtpm-toolstack/error';
import { findHierarchies } from 'vtpm-toolstack/supervisor/cgroups';
import { missingLayers } from 'vtpm-toolstack/supervisor/confinement';
import { isolationProfile, type Layer, layersOf, parseWaived } from 'vtpm-toolstack/supervisor/layers';
import { parseUidRange, WorkerUids } from 'vtpm-toolstack/supervisor/worker-uids';
import {
  buildStubImage,
  removeDirectory,
  StubManager,
  SupervisorProcess,
  temporaryDirectory,
  until,
  writeManifest,
} from './supervisor-fixture.js';

const isRoot = process.getuid?.() === 0;
const hasCode = (code: string) => (error: unknown) => (error as ToolstackError).code === code;

describe('the layers around a worker', function () {
  this.timeout(60_000);
  let image: string;
  let manifest: string;
  let home: string;
  let supervisor: SupervisorProcess;
  let manager: StubManager;
  /** What this machine cannot give, as scripts/test.mjs says. */
  const waivedHere = (process.env.VTPM_WAIVE_LAYERS ?? '').split(',').filter(Boolean);

  before(async () => {
    image = temporaryDirectory();
    manifest = await buildStubImage(image);
  });
  after(() => removeDirectory(image));
  beforeEach(() => {
    home = temporaryDirectory();
  });
  afterEach(async () => {
    await supervisor?.end('SIGKILL');
    await manager?.stop();
    removeDirectory(home);
  });

  async function begin(flags: string[] = [], from = manifest, wrapper: string[] = []): Promise<void> {
    const all = ['--log-format', 'json', ...flags];
    supervisor = await new SupervisorProcess(home, from, all, { wrapper }).ready();
    manager = new StubManager(supervisor.paths);
    await manager.start();
  }

  async function start(name: string, change: Record<string, unknown> = {}) {
    await supervisor.create(name, change);
    return (await supervisor.call('POST', `/vtpms/${name}/start`)).body;
  }

  const groupsOf = (pid: number): string[] =>
    [...findHierarchies()].flatMap(([, { own }]) =>
      readdirSync(own)
        .filter((name) => name.startsWith(`vtpm-${pid}-`))
        .map((name) => join(own, name)),
    );

  const has = (layer: string): boolean => isRoot && !waivedHere.includes(layer);

  /** What there is instead of a test where the layer is no part of the profile, or is waived on this machine. */
  async function runsWithout(layer: Layer): Promise<void> {
    await begin();
    const { worker } = await start('web1');
    assert.ok(!worker.layers.includes(layer));
    assert.deepEqual(
      [worker.profile, worker.waived.includes(layer)],
      isRoot ? ['system', true] : ['user', false],
    );
    if (layer !== 'uid') assert.deepEqual(groupsOf(supervisor.pid), []);
  }

  it('are all of the profile in /proc, and shown', async () => {
    await begin();
    const { worker } = await start('web1');
    assert.equal(worker.profile, isolationProfile());
    assert.deepEqual(worker.waived, waivedHere);
    assert.deepEqual(worker.layers, layersOf(worker.profile, parseWaived(waivedHere.join(','))));
    assert.equal(worker.layers.includes('uid'), isRoot && !waivedHere.includes('uid'));
    const bare = (await start('dev1', { isolation: 'none' })).worker;
    assert.deepEqual([bare.layers, bare.waived], [[], []], 'positive control');
  });

  it('give each worker a uid of its own on the host, which nobody else has', async () => {
    if (!has('uid')) return await runsWithout('uid');
    await begin(['--worker-uids', '2000000100-2000000101']);
    const workers = [(await start('web1')).worker, (await start('web2')).worker];
    const uids = workers.map(({ pid }) => uidsOf(pid));
    assert.deepEqual(uids.flat().sort(), [...Array(4).fill(2000000100), ...Array(4).fill(2000000101)]);
    for (const { pid } of workers) assert.equal(statSync(`/proc/${pid}/cwd/app/stub.mjs`).uid, 0);
    // The directories above the image stay closed.
    assert.equal(statSync(supervisor.paths.supervisor.directory).mode & 0o777, 0o700);
    const third = await start('web3');
    assert.equal(third.error.code, 'layer-missing');
    assert.match(third.error.message, /all uids from 2000000100 to 2000000101 are used.*worker-uids/);
    await supervisor.call('POST', '/vtpms/web1/stop');
    const again = (await supervisor.call('POST', '/vtpms/web3/start')).body;
    assert.deepEqual(uidsOf(again.worker.pid), uids[0]);
  });

  it('end with the worker, and what a killed supervisor left its successor removes', async () => {
    if (!has('cgroup:memory')) return await runsWithout('cgroup:memory');
    await begin();
    await start('web1');
    const { worker } = await start('web2');
    const groups = groupsOf(supervisor.pid);
    assert.ok(groups.length >= 2 && groups.length % 2 === 0, String(groups));
    const inside = groups.filter((path) =>
      readFileSync(join(path, 'cgroup.procs'), 'utf8').includes(`${worker.pid}\n`),
    );
    assert.equal(inside.length, groups.length / 2);
    // bubblewrap's processes too.
    for (const path of inside)
      assert.equal(readFileSync(join(path, 'cgroup.procs'), 'utf8').trim().split('\n').length, 3);
    await supervisor.call('POST', '/vtpms/web2/stop');
    await until(() => groupsOf(supervisor.pid).length === groups.length / 2);
    await supervisor.end('SIGKILL');
    await until(() => !existsSync(`/proc/${worker.pid}`));
    await manager.stop();
    const before = supervisor.pid;
    const left = groupsOf(before);
    assert.ok(left.length > 0);
    // Of one with the same id in another container, whose processes nobody here can see.
    const [own = ''] = left;
    const foreign = own.replace(/-\d+-\d+$/, '-1-1');
    mkdirSync(foreign);
    try {
      await begin();
      assert.deepEqual(groupsOf(before), [foreign]);
    } finally {
      rmdirSync(foreign);
    }
    await supervisor.end('SIGTERM');
    assert.deepEqual(groupsOf(supervisor.pid), []);
  });

  it('are looked at: a worker that is not locked down when it says that it is ready gets no identity', async () => {
    const directory = temporaryDirectory();
    await buildStubImage(directory);
    const NODE_OPTIONS = "--import=data:text/javascript,process.argv.push('--no-seccomp')";
    await begin(
      [],
      writeManifest(directory, ['stub.mjs', 'node_modules/koffi.node'], { environment: { NODE_OPTIONS } }),
    );
    const refused = await start('web1');
    assert.equal(refused.error.code, 'layer-missing');
    assert.match(refused.error.message, /seccomp:serve \(the kernel says that the worker runs without it\)/);
    assert.deepEqual(manager.tickets, []);
    removeDirectory(directory);
  });

  it('are refused by name where the machine does not give them, until they are waived by name', async () => {
    if (!has('uid')) return await runsWithout('uid');
    const without = ['setpriv', '--bounding-set=-sys_admin', '--inh-caps=-sys_admin'];
    await begin([], manifest, without);
    const refused = await start('web1');
    assert.equal(refused.error.code, 'layer-missing');
    assert.match(
      refused.error.message,
      /: uid \(unshare: .*not permitted\); to run without, set waive-layers to \S*uid\S* in .*config.json/,
    );
    assert.match(supervisor.stderr, /"layer":"uid".*does not give this layer/);
    assert.equal((await start('dev1', { isolation: 'none' })).state, 'running');
    await supervisor.end('SIGTERM');
    await manager.stop();
    writeFileSync(
      supervisor.paths.config,
      JSON.stringify({ 'waive-layers': ['uid', ...waivedHere].join(',') }),
    );
    await begin([], manifest, without);
    const { body } = await supervisor.call('POST', '/vtpms/web1/start');
    assert.equal(body.state, 'running', JSON.stringify(body));
    assert.ok(body.worker.waived.includes('uid') && !body.worker.layers.includes('uid'));
    assert.match(supervisor.stderr, /"layer":"uid".*waived/);
  });

  it('can be waived where they are names, and only those that a machine may lack', () => {
    assert.deepEqual([...parseWaived(' uid, cgroup:cpu ')], ['uid', 'cgroup:cpu']);
    for (const text of ['namespace:net', 'no-capabilities', 'sandbox', 'uid;limits']) {
      assert.throws(() => parseWaived(text), hasCode('usage'), text);
    }
    const waived = parseWaived('limits');
    assert.ok(!layersOf('system', waived).includes('limits'));
    assert.ok(layersOf('system', waived).includes('uid'));
    assert.ok(!layersOf('user', new Set()).some((layer) => layer === 'uid' || layer.startsWith('cgroup')));
  });

  it('that are missing are found before a supervisor runs', async () => {
    const missing = await missingLayers();
    assert.deepEqual(
      [...missing.keys()].filter((layer) => !waivedHere.includes(layer)),
      [],
    );
    for (const reason of missing.values()) assert.notEqual(reason, '');
  });

  describe('uids', () => {
    let directory: string;
    beforeEach(() => {
      directory = mkdtempSync(join(tmpdir(), 'vtpm-uids-'));
    });
    afterEach(() => rmSync(directory, { recursive: true }));

    const files = (passwd = '', subuid = '') => {
      writeFileSync(join(directory, 'passwd'), passwd);
      writeFileSync(join(directory, 'subuid'), subuid);
      const at = (name: string) => join(directory, name);
      return { passwd: at('passwd'), subuid: at('subuid'), lock: at('lock') };
    };

    it('are never given to two at once, whatever supervisors of the host ask for', () => {
      fc.assert(
        fc.property(fc.array(fc.tuple(fc.nat(2), fc.boolean(), fc.nat(20)), { maxLength: 60 }), (steps) => {
          const offices = [0, 1, 2].map(() => new WorkerUids({ first: 70_000, last: 70_007 }, files()));
          const live: { office: WorkerUids; uid: number }[] = [];
          for (const [which, isTaking, index] of steps) {
            const office = offices[which]!;
            if (isTaking && live.length === 8) assert.throws(() => office.take(), hasCode('layer-missing'));
            else if (isTaking) live.push({ office, uid: office.take() });
            else for (const ended of live.splice(index % 8, 1)) ended.office.give(ended.uid);
            assert.equal(new Set(live.map(({ uid }) => uid)).size, live.length);
          }
          for (const office of offices) office.close();
        }),
        { numRuns: 50 },
      );
    });

    it('are refused where somebody has one of them', () => {
      const range = { first: 70_000, last: 70_009 };
      assert.throws(() => new WorkerUids(range, files('ann:x:70009:70009::/:/bin/sh\n')), hasCode('usage'));
      assert.throws(() => new WorkerUids(range, files('', 'ann:69000:1001\n')), hasCode('usage'));
      new WorkerUids(range, files('ann:x:70010:70010::/:/bin/sh\n', 'ann:69000:1000\n')).close();
      for (const text of ['5', '0-9', '70000-65000', '70000-4294967295', '-1-5', 'a-b']) {
        assert.throws(() => parseUidRange(text), hasCode('usage'), text);
      }
    });
  });

  describe('cgroups', () => {
    it('are found in both versions, in a container, and where both are mounted', () => {
      const directory = mkdtempSync(join(tmpdir(), 'vtpm-cgroups-'));
      writeFileSync(join(directory, 'cgroup.controllers'), 'cpuset memory pids\n');
      const v2 = `30 23 0:27 / ${directory} rw,nosuid - cgroup2 cgroup2 rw\n`;
      const v1 =
        '31 23 0:28 / /cg/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n32 23 0:29 /docker/1 /cg/memory rw - cgroup cgroup rw,memory\n';
      const found = (mounts: string, own: Record<string, string>) =>
        Object.fromEntries(findHierarchies(mounts, new Map(Object.entries(own))));
      assert.deepEqual(found(v2, { '': '/system.slice/x.service' }), {
        memory: { version: 2, mount: directory, own: join(directory, 'system.slice/x.service') },
        pids: { version: 2, mount: directory, own: join(directory, 'system.slice/x.service') },
      });
      assert.deepEqual(found(v1 + v2, { '': '/', cpu: '/a', memory: '/docker/1/b' }), {
        cpu: { version: 1, mount: '/cg/cpu,cpuacct', own: '/cg/cpu,cpuacct/a' },
        memory: { version: 1, mount: '/cg/memory', own: '/cg/memory/b' },
        pids: { version: 2, mount: directory, own: directory },
      });
      assert.deepEqual(found(v1, { cpu: '/', memory: '/elsewhere' }), {
        cpu: { version: 1, mount: '/cg/cpu,cpuacct', own: '/cg/cpu,cpuacct' },
      });
      rmSync(directory, { recursive: true });
    });
  });
});

function uidsOf(pid: number): number[] {
  const line = /^Uid:\t(.*)$/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1] ?? '';
  return line.split('\t').map(Number);
}
