import assert from 'node:assert/strict';
import { setTimeout as delay } from 'node:timers/promises';
import type { BarrierSwitch } from './barrier-switch.js';
import { migrate, type ToldProgress } from './migrate.js';
import { MovingVtpm } from './moving-vtpm.js';
import { workersBelow } from './process-tree.js';
import { type Host, TwoHosts } from './two-hosts.js';
import { until } from './until.js';

export const VICTIMS = [
  'source manager',
  'destination manager',
  'source supervisor',
  'destination supervisor',
  'source worker',
  'destination worker',
  'network',
] as const;
export type Victim = (typeof VICTIMS)[number];

/** A step of a migration at which a process is stopped, and what fails there. */
export interface MigrationFault {
  readonly side: 'source' | 'destination';
  readonly daemon: 'manager' | 'supervisor';
  readonly barrier: string;
  readonly victims: readonly Victim[];
  /** What fails before it: otherwise nobody comes there. */
  readonly before?: MigrationFault;
}

/** What both managers may take to come to one view by themselves, before the operator is asked. */
const SETTLES_MS = 20_000;
/** To a step, with inquiries that nobody answers on the way. */
const COMES_THERE_MS = 90_000;
/** From the end to the last step of the destination, which lets the guest go first. */
const LAST_STEP_MS = 5_000;
const NAME = 'web1';

/**
 * One vTPM under a guest that never pauses, that is moved again and again while something fails. After each failure: it can run
 * at one host and not at the other, at none only until the one command of the operator, and what its guest was told is so.
 */
export class MigrationCrashRig {
  /** How often each barrier was come to. */
  readonly reached = new Map<string, number>();
  /** How it ended, and how often. */
  readonly ends = new Map<string, number>();
  faults = 0;
  #strikes = 0;

  private constructor(
    private readonly hosts: TwoHosts,
    private readonly vtpm: MovingVtpm,
  ) {}

  static async create(): Promise<MigrationCrashRig> {
    const hosts = await TwoHosts.create();
    try {
      return new MigrationCrashRig(hosts, await MovingVtpm.create(hosts, NAME));
    } catch (error) {
      await hosts.destroy();
      throw error;
    }
  }

  async destroy(): Promise<void> {
    await this.vtpm.destroy();
    await this.hosts.destroy();
  }

  /** @throws AssertionError for two live copies, for none, and for anything that its guest was told and is not so */
  async endure(fault: MigrationFault): Promise<void> {
    const source = this.vtpm.host;
    const destination = this.hosts.other(source);
    this.vtpm.load();
    // What one that failed has left.
    for (const host of [source, destination])
      for (const daemon of [host.manager, host.supervisor]) daemon.release();
    const stages = fault.before ? [fault.before, fault] : [fault];
    for (const stage of stages) switchOf(stage, source, destination).stopAt(stage.barrier, 'wait');
    let end: string | undefined;
    let why = '';
    let endedAt = Number.POSITIVE_INFINITY;
    const back: Promise<void>[] = [];
    const migration = ordered(source, destination)
      .then((lines) => lines.at(-1)?.phase ?? 'nothing')
      .catch(({ code = 'broken off', message }: Error & { code?: string }) => {
        why = message;
        return code;
      })
      .then((said) => {
        end = said;
        endedAt = Date.now();
      });
    for (const stage of stages) {
      const stopped = switchOf(stage, source, destination);
      const isOver = (): boolean => stopped.isReached(stage.barrier) || Date.now() > endedAt + LAST_STEP_MS;
      await until(`${stage.barrier} or the end`, isOver, COMES_THERE_MS);
      // What comes after another failure may end before.
      if (!fault.before)
        assert.ok(stopped.isReached(stage.barrier), `${sayFault(fault)}: it ended before (${end}: ${why})`);
      if (stopped.isReached(stage.barrier)) {
        this.reached.set(stage.barrier, (this.reached.get(stage.barrier) ?? 0) + 1);
        for (const victim of stage.victims) await this.#strike(victim, source, destination);
      }
      stopped.release(stage.barrier);
      const mended = this.#mend(source, destination, stage.victims, migration);
      back.push(mended);
      const next = stages[stages.indexOf(stage) + 1];
      // Who comes back may be stopped at the next step before it is all there.
      const isNext =
        next &&
        until(
          'the next step',
          () => switchOf(next, source, destination).isReached(next.barrier),
          COMES_THERE_MS,
        );
      await (isNext ? Promise.race([mended, isNext.catch(() => undefined)]) : mended);
    }
    await Promise.all([...back, migration]);
    const said = end ?? 'nothing';
    this.ends.set(said, (this.ends.get(said) ?? 0) + 1);
    this.faults++;
    const what = `${sayFault(fault)} (${said})`;
    await this.#checkAtMostOne(what);
    await this.#settle(what, source);
    await this.#checkOneRuns(
      what,
      stages.flatMap(({ victims }) => victims),
    );
  }

  /** Both audit logs are whole at the end. */
  async finish(): Promise<void> {
    await this.vtpm.check();
    for (const { installation } of [this.hosts.a, this.hosts.b]) {
      const { code, stdout, stderr } = await installation.ctl('audit', 'verify');
      assert.equal(code, 0, stdout + stderr);
    }
  }

  async #strike(victim: Victim, source: Host, destination: Host): Promise<void> {
    const { network } = this.hosts;
    this.#strikes++;
    if (victim === 'network') return network.cut();
    const { installation } = victim.startsWith('source') ? source : destination;
    if (victim.endsWith('manager')) return installation.killManager();
    if (victim.endsWith('supervisor')) return installation.killSupervisor();
    for (const pid of workersBelow(installation.supervisor?.pid ?? 0)) process.kill(pid, 'SIGKILL');
  }

  /** What failed comes back, in the order in which an operator would see to it. */
  async #mend(
    source: Host,
    destination: Host,
    victims: readonly Victim[],
    migration: Promise<void>,
  ): Promise<void> {
    if (victims.includes('network')) {
      // Long enough that somebody gives up, or the moment before.
      await Promise.race([migration, delay(Math.random() < 0.5 ? 100 : 8_000, undefined, { ref: false })]);
      this.hosts.network.heal();
    }
    for (const [side, host] of [
      ['source', source],
      ['destination', destination],
    ] as const) {
      if (victims.includes(`${side} manager`)) await this.#comesBack(() => host.startManager());
      if (victims.includes(`${side} supervisor`)) await this.#comesBack(() => host.startSupervisor());
    }
  }

  /** What fails before it is all there is brought back after that failure. */
  async #comesBack(start: () => Promise<unknown>): Promise<void> {
    const strikes = this.#strikes;
    try {
      await start();
    } catch (error) {
      if (this.#strikes === strikes) throw error;
    }
  }

  /** Also while it is in doubt, and whoever asks for it. */
  async #checkAtMostOne(what: string): Promise<void> {
    const both = [this.hosts.a, this.hosts.b];
    for (const { installation } of both) await installation.supervisord('POST', `/vtpms/${NAME}/start`);
    const states = await Promise.all(both.map(stateAt));
    assert.notDeepEqual(states, ['running', 'running'], `${what}: it runs twice`);
  }

  /** By themselves, or by the one command. */
  async #settle(what: string, source: Host): Promise<void> {
    const isSettled = async (): Promise<boolean> => {
      const open = await Promise.all([this.hosts.a, this.hosts.b].map(openMigrations));
      return open.every((count) => count === 0);
    };
    const byThemselves = await until('they settle it', isSettled, SETTLES_MS).catch(() => false);
    if (byThemselves) return;
    this.ends.set('resolved', (this.ends.get('resolved') ?? 0) + 1);
    const { code, stdout, stderr } = await source.installation.ctl('migrate', 'resolve', NAME);
    assert.equal(code, 0, `${what}: migrate resolve: ${stdout}${stderr}`);
    await until(`${what}: it is settled`, isSettled);
  }

  /** Wherever it does not run, it is asked to. */
  async #checkOneRuns(what: string, victims: readonly Victim[]): Promise<void> {
    const { a, b } = this.hosts;
    const running = await until(`${what}: it runs somewhere`, async () => {
      const states = await Promise.all([a, b].map(stateAt));
      if (
        states.some((state) =>
          ['starting', 'restarting', 'stopping', 'migrating', 'arriving'].includes(state),
        )
      )
        return undefined;
      for (const [index, host] of [a, b].entries()) {
        if (!['running', 'none'].includes(states[index] as string)) {
          await host.installation.supervisord('POST', `/vtpms/${NAME}/start`);
        }
      }
      const run = [];
      for (const host of [a, b]) if ((await stateAt(host)) === 'running') run.push(host);
      return run.length > 0 ? run : undefined;
    });
    assert.equal(running.length, 1, `${what}: it runs at ${running.length} hosts`);
    this.vtpm.host = running[0] as Host;
    const mayBeNew = victims.some((victim) => victim.endsWith('supervisor'));
    await this.vtpm.goOn(mayBeNew).catch((error: Error) => {
      error.message = `${what}: ${error.message}`;
      throw error;
    });
  }
}

/** As an operator would: whoever is told that something is still being done with it orders again. */
async function ordered(source: Host, destination: Host): Promise<ToldProgress[]> {
  for (const limit = Date.now() + COMES_THERE_MS; ; await delay(50)) {
    try {
      return await migrate(source, destination, NAME);
    } catch (error) {
      if ((error as { code?: string }).code !== 'busy' || Date.now() > limit) throw error;
    }
  }
}

function switchOf({ side, daemon }: MigrationFault, source: Host, destination: Host): BarrierSwitch {
  return (side === 'source' ? source : destination)[daemon];
}

export function sayFault({ side, daemon, barrier, victims, before }: MigrationFault): string {
  const said = `${victims.join(' and ')} lost while the ${side}'s ${daemon} is at ${barrier}`;
  return before ? `${sayFault(before)}, then ${said}` : said;
}

async function openMigrations({ installation }: Host): Promise<number> {
  const { body } = await installation.admin('GET', '/migrations');
  const migrations = body.migrations as { state: string }[];
  return migrations.filter(({ state }) => !['committed', 'aborted'].includes(state)).length;
}

async function stateAt({ installation }: Host): Promise<string> {
  const { status, body } = await installation.supervisord('GET', `/vtpms/${NAME}`);
  return status === 200 ? String(body.state) : 'none';
}
