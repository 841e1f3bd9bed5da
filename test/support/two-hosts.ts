import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { BarrierSwitch } from './barrier-switch.js';
import { type Answer, Installation } from './installation.js';
import { type Place, TwoNetworks } from './two-networks.js';

export type HostName = 'a' | 'b';

/** An installation with its place in the network. Each of its daemons can be stopped at a barrier. */
export class Host {
  readonly manager: BarrierSwitch;
  readonly supervisor: BarrierSwitch;

  private constructor(
    readonly name: HostName,
    readonly installation: Installation,
    readonly place: Place,
    private readonly managerEnv: NodeJS.ProcessEnv,
  ) {
    this.manager = new BarrierSwitch(this.#directory('manager'));
    this.supervisor = new BarrierSwitch(this.#directory('supervisor'));
  }

  static async create(name: HostName, place: Place, options: HostOptions): Promise<Host> {
    const installation = await Installation.create({ ...options, under: place.under });
    return new Host(name, installation, place, options.managerEnv ?? {});
  }

  /** `HOST:PORT`, as an operator gives it. */
  address(family: 'v4' | 'v6' = 'v4'): string {
    const { v4, v6, port } = this.place;
    return family === 'v4' ? `${v4}:${port}` : `[${v6}]:${port}`;
  }

  startManager(): Promise<Answer> {
    const { v6 } = this.place;
    const listen = [this.address(), ...(v6 ? [this.address('v6')] : [])].join(',');
    return this.installation.startManager({
      nodeArgs: this.manager.nodeArgs,
      env: { ...this.managerEnv, VTPM_PEER_LISTEN: listen },
    });
  }

  startSupervisor(): Promise<Answer> {
    return this.installation.startSupervisor({ nodeArgs: this.supervisor.nodeArgs });
  }

  async start(): Promise<void> {
    await this.startManager();
    await this.startSupervisor();
  }

  /** Knows the other from now on, as its operator does it. @param family of the address it calls */
  async know(other: Host, family: 'v4' | 'v6' = 'v4'): Promise<void> {
    const identity = await other.installation.ctl('peer', 'identity');
    if (identity.code !== 0) throw new Error(`peer identity: ${identity.stderr}`);
    const file = join(this.installation.directory, `${other.name}.peer`);
    writeFileSync(file, identity.stdout);
    const { endorsement } = await other.installation.ctlJson('peer', 'identity');
    await this.installation.ctlJson(
      ...['peer', 'add', other.name, file, '--address', other.address(family)],
      ...['--ek-fingerprint', String((endorsement as { fingerprint: string }).fingerprint)],
      '--approve-current',
    );
  }

  #directory(daemon: string): string {
    const path = join(this.installation.directory, `${daemon}-barrier`);
    mkdirSync(path);
    return path;
  }
}

export interface HostOptions {
  readonly managerEnv?: NodeJS.ProcessEnv;
  readonly homeDisk?: string;
}

/** Two whole installations, each on a TPM and in a network of its own, that know each other as peers. */
export class TwoHosts {
  private constructor(
    readonly network: TwoNetworks,
    readonly a: Host,
    readonly b: Host,
  ) {}

  /** Both run, and each knows the other. */
  static async create(options: Partial<Record<HostName, HostOptions>> = {}): Promise<TwoHosts> {
    const hosts = await TwoHosts.strangers(options);
    await hosts.a.know(hosts.b);
    await hosts.b.know(hosts.a);
    return hosts;
  }

  /** Both run, and neither knows the other. */
  static async strangers(options: Partial<Record<HostName, HostOptions>> = {}): Promise<TwoHosts> {
    const network = await TwoNetworks.create();
    const made = await Promise.allSettled(
      (['a', 'b'] as const).map((name, index) =>
        Host.create(name, network.places[index] as Place, options[name] ?? {}),
      ),
    );
    const hosts = made.flatMap((result) => (result.status === 'fulfilled' ? [result.value] : []));
    const [a, b] = hosts;
    if (!a || !b) {
      for (const host of hosts) await host.installation.destroy();
      await network.destroy();
      throw made.find((result) => result.status === 'rejected')?.reason;
    }
    const both = new TwoHosts(network, a, b);
    try {
      await Promise.all([a.start(), b.start()]);
      return both;
    } catch (error) {
      await both.destroy();
      throw error;
    }
  }

  other(host: Host): Host {
    return host === this.a ? this.b : this.a;
  }

  async destroy(): Promise<void> {
    await Promise.all(
      [this.a, this.b].map((host) => {
        host.manager.release();
        host.supervisor.release();
        return host.installation.destroy();
      }),
    );
    await this.network.destroy();
  }
}
