import assert from 'node:assert/strict';
import { connectGuest } from 'vtpm-quickstart/guest';
import { ExactGuest } from './exact-guest.js';
import { FollowingDoor } from './following-door.js';
import { type MigrateOptions, migrated, type ToldProgress } from './migrate.js';
import type { Host, TwoHosts } from './two-hosts.js';

/** A vTPM that goes from host to host, with a guest that knows exactly what it must be at. */
export class MovingVtpm {
  readonly way: FollowingDoor;
  #guest: ExactGuest | undefined;
  #running: Promise<void> | undefined;
  #isStopping = false;
  #onRound: () => void = () => {};
  #identity = '';
  #generation = 0;
  #epoch = 0;

  private constructor(
    readonly hosts: TwoHosts,
    readonly name: string,
    readonly id: string,
    /** Where it lives. */
    public host: Host,
  ) {
    this.way = new FollowingDoor([hosts.a, hosts.b].map(({ installation }) => installation.door(name)));
  }

  /** On `a`, running, with its guest. */
  static async create(hosts: TwoHosts, name: string): Promise<MovingVtpm> {
    const { installation } = hosts.a;
    await installation.vtpm(name);
    const { body } = await installation.supervisord('GET', `/vtpms/${name}`);
    const moving = new MovingVtpm(hosts, name, String(body.id), hosts.a);
    const guest = await connectGuest(installation.door(name));
    await guest.makeKey();
    await guest.close();
    moving.#identity = await moving.#askIdentity();
    moving.#guest = await ExactGuest.connect(moving.way);
    await moving.#checkRecord();
    return moving;
  }

  get guest(): ExactGuest {
    if (!this.#guest) throw new Error('the vTPM has no guest yet');
    return this.#guest;
  }

  /** The guest works without pause from now on. */
  load(): void {
    this.#isStopping = false;
    this.#running = (async () => {
      while (!this.#isStopping) {
        await this.guest.round();
        this.#onRound();
      }
    })();
    // It is awaited by who pauses it.
    this.#running.catch(() => undefined);
  }

  /** Two, so that one of them began after this was asked. @throws what the guest found wrong */
  async moreRounds(): Promise<void> {
    const enough = this.guest.rounds + 2;
    const come = new Promise<void>((resolve) => {
      this.#onRound = () => {
        if (this.guest.rounds >= enough) resolve();
      };
    });
    await Promise.race([come, this.#running]);
  }

  /** @throws what the guest found wrong */
  async pause(): Promise<void> {
    this.#isStopping = true;
    await this.#running;
    this.#running = undefined;
  }

  /** To the other host, and looks at everything there. Under load where there is one. */
  async move(options: MigrateOptions = {}): Promise<ToldProgress> {
    const there = this.hosts.other(this.host);
    const wasRunning = this.#running !== undefined;
    const last = await migrated(this.host, there, this.name, options);
    this.host = there;
    if (wasRunning) {
      await this.moreRounds();
      await this.pause();
    }
    await this.check();
    if (wasRunning) this.load();
    return last;
  }

  /** Stopped before, started after. */
  async moveOffline(): Promise<ToldProgress> {
    const wasRunning = this.#running !== undefined;
    if (wasRunning) await this.pause();
    await this.host.installation.ctlJson('stop', this.name);
    const there = this.hosts.other(this.host);
    const last = await migrated(this.host, there, this.name, { mode: 'OFFLINE' });
    this.host = there;
    await there.installation.ctlJson('start', this.name);
    await this.guest.afterPowerCycle();
    await this.check();
    if (wasRunning) this.load();
    return last;
  }

  /**
   * Its guest goes on after a failure, and then pauses: two rounds more, and everything is as it was told.
   * @param mayBeNew where the VM run may have ended with what failed
   */
  async goOn(mayBeNew: boolean): Promise<void> {
    try {
      await this.moreRounds();
      await this.pause();
    } catch (error) {
      this.#running = undefined;
      if (!mayBeNew || !(await this.guest.wasReset())) throw error;
      await this.guest.afterPowerCycle(false);
    }
    await this.check();
  }

  /** The guest pauses. Everything acknowledged is there, the keys are the same, and the record went forward. */
  async check(): Promise<void> {
    await this.guest.round();
    await this.guest.checkLockout();
    assert.equal(await this.#askIdentity(), this.#identity, 'the keys');
    await this.#checkRecord();
  }

  async destroy(): Promise<void> {
    this.#isStopping = true;
    await this.#guest?.close();
    await this.#running?.catch(() => undefined);
  }

  async #askIdentity(): Promise<string> {
    const guest = await connectGuest(this.host.installation.door(this.name));
    try {
      return `${await guest.keyFingerprint()} ${await guest.endorsement()}`;
    } finally {
      await guest.close();
    }
  }

  async #checkRecord(): Promise<void> {
    const { body } = await this.host.installation.admin('GET', `/vtpms/${this.id}`);
    const { generation, epoch } = body as { generation: number; epoch: number };
    assert.ok(
      generation >= this.#generation,
      `the generation went from ${this.#generation} to ${generation}`,
    );
    assert.ok(epoch >= this.#epoch, `the epoch went from ${this.#epoch} to ${epoch}`);
    this.#generation = generation;
    this.#epoch = epoch;
  }
}
