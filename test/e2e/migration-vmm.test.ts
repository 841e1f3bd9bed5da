import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { ExactGuest } from '../support/exact-guest.js';
import { MovingVm } from '../support/moving-vm.js';
import { Ordered } from '../support/ordered-migration.js';
import { type Host, TwoHosts } from '../support/two-hosts.js';
import { until } from '../support/until.js';
import { u32, type Vmm } from '../support/vmm.js';

const FAIL = 9;

describe('a vTPM that moves with its VM', () => {
  let hosts: TwoHosts;
  let vm: MovingVm;
  let guest: ExactGuest;
  let there: Vmm | undefined;

  before(async () => {
    hosts = await TwoHosts.create();
  });
  after(() => hosts?.destroy());
  afterEach(async () => {
    there?.close();
    there = undefined;
    await vm?.close();
  });

  async function boot(name: string): Promise<void> {
    vm = await MovingVm.create(hosts.a, name);
    guest = await ExactGuest.connect(vm);
    await guest.round();
  }
  const show = async (host: Host, name: string) =>
    (await host.installation.supervisord('GET', `/vtpms/${name}`)).body;

  it('goes with the reference that its VMM carries, and comes back: nothing lost, no reset seen', async () => {
    await boot('moves');
    for (const [from, to] of [
      [hosts.a, hosts.b],
      [hosts.b, hosts.a],
    ] as const) {
      const migration = new Ordered(from, to, 'moves');
      await migration.reached('PREPARED');
      await migration.says(/waits for its VM: migrate that now/);
      // The RAM goes first, and the guest works.
      await guest.round();
      there = await MovingVm.incoming(to, 'moves');
      const carried = await vm.takeOut();
      assert.ok(carried.permanent.length < 200, 'a reference, and no state');
      assert.equal(await MovingVm.bringIn(there, carried), 0);
      vm.goOn(there);
      await guest.round();
      const { result, message } = await migration.ended;
      assert.equal(result, 'migrated', message);
      assert.equal((await show(from, 'moves')).state, 'moved');
      await guest.round();
      await guest.checkLockout();
      // A worker like any other.
      process.kill(await to.installation.workerPid('moves'), 'SIGKILL');
      await guest.round();
      await until('another one runs', async () => (await show(to, 'moves')).state === 'running');
    }
  });

  it('stays where its VM goes on after all, and what the destination holds is worthless', async () => {
    await boot('stays');
    for (const back of [
      'LOCK_STORAGE',
      'a command of the guest',
      'after the end of the other VMM',
    ] as const) {
      const migration = new Ordered(hosts.a, hosts.b, 'stays');
      await migration.reached('PREPARED');
      there = await MovingVm.incoming(hosts.b, 'stays');
      const carried = await vm.takeOut();
      if (back === 'after the end of the other VMM') there.close();
      if (back === 'a command of the guest') {
        process.kill(await hosts.b.installation.workerPid('stays'), 'SIGKILL');
        process.kill(await hosts.a.installation.workerPid('stays'), 'SIGKILL');
      } else {
        assert.equal(await vm.vmm.result('LOCK_STORAGE', u32(300)), 0, back);
      }
      await guest.round();
      const { result } = await migration.ended;
      assert.equal(result, 'not-migrated', back);
      assert.equal((await show(hosts.a, 'stays')).state, 'running');
      await until(
        'nothing is left at the destination',
        async () => (await show(hosts.b, 'stays')).id === undefined,
      );
      if (back !== 'LOCK_STORAGE') continue;
      await assert.rejects(MovingVm.bringIn(there, carried), 'its door is closed');
    }
    await guest.checkLockout();
  });

  it('is taken over for the reference that its state has, and for no other', async () => {
    await boot('refers');
    const migration = new Ordered(hosts.a, hosts.b, 'refers');
    await migration.reached('PREPARED');
    there = await MovingVm.incoming(hosts.b, 'refers');
    assert.equal(await there.result('INIT', u32(0)), FAIL, 'nothing was brought');
    const carried = await vm.takeOut();
    const reference = randomBytes(32);
    const forged = Object.fromEntries(
      Object.entries(carried).map(([half, blob]) => {
        const changed = Buffer.from(blob);
        changed.set(reference, 80);
        return [half, changed];
      }),
    ) as unknown as typeof carried;
    assert.equal(await MovingVm.bringIn(there, forged), FAIL);
    assert.equal((await show(hosts.b, 'refers')).state, 'arriving');
    assert.equal(await MovingVm.bringIn(there, carried), 0);
    // Two VMs, and one TPM.
    assert.notEqual(await vm.vmm.result('LOCK_STORAGE', u32(300)).catch(() => FAIL), 0);
    vm.goOn(there);
    await guest.round();
    assert.equal((await migration.ended).result, 'migrated');
  });

  it('stays, and at once, where the supervisor that was to serve its VMM there is killed', async () => {
    await boot('orphan');
    const migration = new Ordered(hosts.a, hosts.b, 'orphan');
    await migration.reached('PREPARED');
    await hosts.b.installation.killSupervisor();
    await hosts.b.startSupervisor();
    const { result, message } = await migration.ended;
    assert.equal(result, 'not-migrated', message);
    assert.match(message, /the supervisor that was to serve its VMM has ended; migrate it again/);
    await guest.round();
    assert.equal((await show(hosts.a, 'orphan')).state, 'running');
    await until(
      'nothing is left at the destination',
      async () => (await show(hosts.b, 'orphan')).id === undefined,
    );
  });

  it('does not go where its VMM would carry the state itself', async () => {
    const { installation } = hosts.a;
    const args = ['--doors', 'control', '--startup', 'none', '--state-blobs', 'plain'];
    await installation.ctlJson('create', 'plain', ...args);
    await installation.ctlJson('start', 'plain');
    vm = await MovingVm.boot(hosts.a, 'plain');
    await until('the VMM is known', async () => (await show(hosts.a, 'plain')).vmm !== null);
    const { message } = await new Ordered(hosts.a, hosts.b, 'plain').ended;
    assert.match(message, /state blobs that are references/);
    assert.equal((await show(hosts.a, 'plain')).state, 'running');
  });

  it('goes nowhere where it is cancelled before its VMM takes it out', async () => {
    await boot('cancels');
    const migration = new Ordered(hosts.a, hosts.b, 'cancels');
    await migration.reached('PREPARED');
    there = await MovingVm.incoming(hosts.b, 'cancels');
    migration.interrupt();
    assert.equal((await migration.ended).result, 'not-migrated');
    const carried = await vm.takeOut();
    await assert.rejects(MovingVm.bringIn(there, carried));
    assert.equal(await vm.vmm.result('LOCK_STORAGE', u32(300)), 0);
    await guest.round();
  });
});
