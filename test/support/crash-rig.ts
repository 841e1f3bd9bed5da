import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { connectGuest } from 'vtpm-quickstart/guest';
import { buildFaultyWorker, killAt } from './faulty-worker.js';
import { Installation } from './installation.js';
import { GuestLoad, type Tally } from './load.js';
import { until } from './until.js';

export type Victim = 'worker' | 'manager' | 'supervisor';

/**
 * One vTPM under a guest that never pauses, crashed again and again. After each crash the guest's tally is held
 * against its TPM: acknowledged ≤ counter ≤ attempted, nothing seen and then gone, same key and endorsement seed.
 */
export class CrashRig {
  readonly #tally: Tally = { attempted: 0n, acknowledged: 0n, seen: 0n };
  readonly #directory = mkdtempSync(join(tmpdir(), 'vtpm-faults-'));
  #identity = '';

  private constructor(readonly installation: Installation) {}

  static async create(): Promise<CrashRig> {
    const rig = new CrashRig(await Installation.create());
    await rig.installation.start();
    const guest = await connectGuest(await rig.installation.vtpm('web1'));
    await guest.defineCounter();
    rig.#identity = `${await guest.makeKey()} ${await guest.endorsement()}`;
    rig.#tally.seen = await guest.counter();
    // The counter's first value is the TPM's choice; from here on both sides count steps.
    rig.#tally.attempted = rig.#tally.seen;
    rig.#tally.acknowledged = rig.#tally.seen;
    await guest.close();
    return rig;
  }

  async destroy(): Promise<void> {
    await this.installation.destroy();
    rmSync(this.#directory, { recursive: true, force: true });
  }

  /** kill -9 of all `victims` at once, after the guest got `steps` more answers. */
  async killAll(victims: readonly Victim[], steps: bigint): Promise<void> {
    const { installation } = this;
    const load = await this.#loadFor(steps);
    const workerPid = await installation.workerPid('web1');
    if (victims.includes('worker')) process.kill(workerPid, 'SIGKILL');
    await Promise.all([
      victims.includes('manager') ? installation.killManager() : undefined,
      victims.includes('supervisor') ? installation.killSupervisor() : undefined,
    ]);
    if (victims.includes('manager')) await installation.startManager();
    if (victims.includes('supervisor')) await installation.startSupervisor();
    if (victims.includes('supervisor')) {
      await load.finished;
      await this.#startAgain();
    } else {
      // A restart of the manager, or another worker, is a pause to the guest, not an error.
      await this.#moreSteps(3n);
      const isSame = (await installation.workerPid('web1')) === workerPid;
      assert.equal(isSame, !victims.includes('worker'), 'who was not killed must have lived on');
      await load.stop();
    }
    await this.check();
  }

  /**
   * A worker that leaves no checkpoints kills itself the `count`th time it comes to `barrier`: its guest sees that its TPM
   * failed, and does so until it is started again.
   */
  async killWorkerAt(barrier: string, count: number): Promise<void> {
    const { installation } = this;
    const manifest = await buildFaultyWorker(
      join(this.#directory, `${barrier}-${count}`),
      killAt(barrier, count),
    );
    await this.#replaceSupervisor(['--worker-manifest', manifest, '--checkpoint', 'off']);
    await this.#startAgain();
    const load = await GuestLoad.begin(installation.door('web1'), this.#tally);
    await load.finished;
    await until('the worker is known to be dead', async () => (await this.#state()) === 'lost');
    const guest = await connectGuest(installation.door('web1'));
    await assert.rejects(guest.counter(), /TPM_RC_FAILURE/);
    await guest.close();
    await this.#replaceSupervisor([]);
    await this.#startAgain();
    await this.check();
  }

  /** The manager kills itself the `count`th time it comes to `barrier`; the guest must only see a pause. */
  async killManagerAt(barrier: string, count: number): Promise<void> {
    const { installation } = this;
    await installation.killManager();
    const prelude = `data:text/javascript,${encodeURIComponent(killAt(barrier, count))}`;
    await installation.startManager({ nodeArgs: ['--import', prelude] });
    const load = await GuestLoad.begin(installation.door('web1'), this.#tally);
    const manager = installation.manager;
    await until('the manager is dead', () => manager?.signalCode === 'SIGKILL');
    await installation.startManager();
    await this.#moreSteps(3n);
    await load.stop();
    await this.check();
  }

  /** Holds the tally against the TPM. */
  async check(): Promise<void> {
    const guest = await connectGuest(this.installation.door('web1'));
    const counter = await guest.counter();
    const { acknowledged, attempted, seen } = this.#tally;
    assert.ok(acknowledged <= counter, `acknowledged ${acknowledged}, but the counter is ${counter}`);
    assert.ok(counter <= attempted, `the counter is ${counter}, but only ${attempted} steps were asked for`);
    assert.ok(seen <= counter, `a guest saw ${seen}, and now it is ${counter}`);
    assert.equal(`${await guest.keyFingerprint()} ${await guest.endorsement()}`, this.#identity);
    await guest.close();
    // A step that was asked for but not answered is settled now.
    this.#tally.acknowledged = counter;
    this.#tally.attempted = counter;
    this.#tally.seen = counter;
  }

  async #loadFor(steps: bigint): Promise<GuestLoad> {
    const load = await GuestLoad.begin(this.installation.door('web1'), this.#tally);
    await this.#moreSteps(steps);
    return load;
  }

  #moreSteps(steps: bigint): Promise<true> {
    const wanted = this.#tally.acknowledged + steps;
    return until(`${steps} more steps`, () => this.#tally.acknowledged >= wanted);
  }

  async #replaceSupervisor(args: string[]): Promise<void> {
    await this.installation.killSupervisor();
    await this.installation.startSupervisor({ args });
  }

  async #state(): Promise<unknown> {
    return (await this.installation.supervisord('GET', '/vtpms/web1')).body.state;
  }

  /** A new VM run, once the supervisor knows that the old one is over. */
  async #startAgain(): Promise<void> {
    await until('the old run is over', async () =>
      ['crashed', 'stopped'].includes(String(await this.#state())),
    );
    const started = await this.installation.supervisord('POST', '/vtpms/web1/start');
    assert.equal(started.status, 200, JSON.stringify(started.body));
  }
}
