import assert from 'node:assert/strict';
import { once } from 'node:events';
import { MIGRATION_BARRIERS } from 'vtpm-manager/migration/machine';
import { ExactGuest } from '../support/exact-guest.js';
import { MovingVm } from '../support/moving-vm.js';
import { Ordered } from '../support/ordered-migration.js';
import { type Host, TwoHosts } from '../support/two-hosts.js';
import { until } from '../support/until.js';
import { u32, type Vmm } from '../support/vmm.js';

/** Behind PREPARED, where the VMM has its hand in it. */
const STATES: ReadonlySet<string> = new Set([
  ...['freezing', 'departing', 'sending', 'deciding', 'committing'],
  ...['receiving', 'answering', 'settling'],
]);
const POINTS = MIGRATION_BARRIERS.filter(({ state }) => STATES.has(state));

describe('a vTPM that moves with its VM, and something fails (test:long)', function () {
  this.timeout(180_000);
  let hosts: TwoHosts;
  let vm: MovingVm;
  let guest: ExactGuest;
  let there: Vmm | undefined;
  let count = 0;

  before(async () => {
    hosts = await TwoHosts.create();
  });
  after(() => hosts?.destroy());
  afterEach(async () => {
    there?.close();
    there = undefined;
    await vm?.close();
  });

  const show = async (host: Host) =>
    (await host.installation.supervisord('GET', `/vtpms/${vm.name}`)).body as { state?: string };

  async function boot(): Promise<void> {
    vm = await MovingVm.create(hosts.a, `vm${count++}`);
    guest = await ExactGuest.connect(vm);
    await guest.round();
  }

  /** Everything up to where the VMM begins to take the TPM out. */
  async function prepared(): Promise<Ordered> {
    await boot();
    const migration = new Ordered(hosts.a, hosts.b, vm.name);
    await migration.reached('PREPARED');
    there = await MovingVm.incoming(hosts.b, vm.name);
    return migration;
  }

  /** The VM is there, or goes on here: as QEMU finds it. @returns where it is */
  async function goOnSomewhere(carried: Awaited<ReturnType<MovingVm['takeOut']>>): Promise<'here' | 'there'> {
    const init = await MovingVm.bringIn(there!, carried).catch(() => -1);
    if (init === 0) {
      vm.goOn(there!);
      there = undefined;
      return 'there';
    }
    // It stands still for ten seconds each time, at most.
    await until(
      'the VM may go on here',
      async () => (await vm.vmm.result('LOCK_STORAGE', u32(300))) === 0,
      90_000,
    );
    return 'here';
  }

  async function restart(host: Host): Promise<void> {
    const { manager } = host.installation;
    if (manager?.exitCode === null && manager.signalCode === null) await once(manager, 'exit');
    host.manager.release();
    await host.startManager();
  }

  for (const { name, side } of POINTS) {
    it(`the manager of the ${side} is killed at ${name}`, async () => {
      const host = side === 'source' ? hosts.a : hosts.b;
      const migration = await prepared();
      host.manager.stopAt(name, 'die');
      const back = host.manager.reached(name).then(() => restart(host));
      back.catch(() => undefined);
      const carried = await vm.takeOut();
      const where = await goOnSomewhere(carried);
      await guest.round();
      await guest.checkLockout();
      const { result } = await migration.ended;
      // The point may lie behind the end of what was waited for.
      await back;
      if (where === 'here') assert.notEqual(result, 'migrated');
      else assert.notEqual(result, 'not-migrated');
      const other = where === 'here' ? hosts.b : hosts.a;
      await until('the other host has let go of it', async () =>
        [undefined, 'moved'].includes((await show(other)).state),
      );
      await guest.round();
    });
  }

  it('a worker that is killed when its host has decided is followed by one that arrives', async () => {
    const migration = await prepared();
    const carried = await vm.takeOut();
    hosts.b.manager.stopAt('migrate.destination.committed', 'wait');
    const init = MovingVm.bringIn(there!, carried);
    try {
      await hosts.b.manager.reached('migrate.destination.committed');
      process.kill(await hosts.b.installation.workerPid(vm.name), 'SIGKILL');
    } finally {
      hosts.b.manager.release();
    }
    assert.equal(await init, 0);
    vm.goOn(there!);
    there = undefined;
    await guest.round();
    assert.equal((await migration.ended).result, 'migrated');
  });

  it('nobody knows while the line is cut: a request fails, a command waits, and both hear when it is whole', async () => {
    const migration = await prepared();
    await vm.takeOut();
    await until('the state is at the destination', async () => (await show(hosts.a)).state === 'migrating');
    hosts.network.cut();
    try {
      assert.equal(await vm.vmm.result('LOCK_STORAGE', u32(300)), 9);
      const round = guest.round();
      const { result } = await migration.ended;
      assert.equal(result, 'in-doubt');
      hosts.network.heal();
      await round;
    } finally {
      hosts.network.heal();
    }
    assert.equal((await show(hosts.a)).state, 'running');
  });

  it('the supervisor of the destination is killed when the TPM is taken out: the VM goes on at the source', async () => {
    await prepared();
    await vm.takeOut();
    await hosts.b.installation.killSupervisor();
    await hosts.b.startSupervisor();
    assert.equal(await vm.vmm.result('LOCK_STORAGE', u32(300)), 0);
    await guest.round();
  });

  it('the supervisor of the source is killed then: its VMM is lost, and the reference is good there', async () => {
    const migration = await prepared();
    const carried = await vm.takeOut();
    await hosts.a.installation.killSupervisor();
    await hosts.a.startSupervisor();
    await migration.ended;
    // As after any end of a supervisor, an operator starts it again.
    await until('it is known what came of it', async () => (await show(hosts.a)).state === 'lost');
    await assert.rejects(MovingVm.bringIn(there!, carried));
    await hosts.a.installation.ctlJson('start', vm.name);
    there = await MovingVm.incoming(hosts.a, vm.name);
    assert.equal(await MovingVm.bringIn(there, carried), 0);
    vm.goOn(there);
    there = undefined;
    await guest.round();
  });
});
