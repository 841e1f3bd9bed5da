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
  #identity: PeerIdentity | undefined;

  private constructor(
    readonly name: string,
    readonly installation: Installation,
    readonly place: Place,
    private readonly options: HostOptions,
  ) {
    this.manager = new BarrierSwitch(this.#directory('manager'));
    this.supervisor = new BarrierSwitch(this.#directory('supervisor'));
  }

  static async create(name: string, place: Place, options: HostOptions = {}): Promise<Host> {
    const installation = await Installation.create({ ...options, under: place.under });
    return new Host(name, installation, place, options);
  }

  /** Hex. */
  get hostId(): string {
    if (!this.#identity) throw new Error('nobody asked this host who it is');
    return this.#identity.hostId;
  }

  /** What it says of itself to its operator. */
  async identify(): Promise<PeerIdentity> {
    this.#identity ??= (await this.installation.ctlJson('peer', 'identity')) as unknown as PeerIdentity;
    return this.#identity;
  }

  /** `HOST:PORT`, as the operator of another host gives it. */
  address(family: 'v4' | 'v6' = 'v4'): string {
    return this.#at(family, this.place.reachedAt);
  }

  #at(family: 'v4' | 'v6', port: number): string {
    const { v4, v6 } = this.place;
    return family === 'v4' ? `${v4}:${port}` : `[${v6}]:${port}`;
  }

  startManager(): Promise<Answer> {
    const { v6, port } = this.place;
    const listen = [this.#at('v4', port), ...(v6 ? [this.#at('v6', port)] : [])].join(',');
    return this.installation.startManager({
      nodeArgs: [...this.manager.nodeArgs, ...(this.options.nodeArgs ?? [])],
      env: { VTPM_PEER_LISTEN: listen },
    });
  }

  startSupervisor(): Promise<Answer> {
    return this.installation.startSupervisor({
      nodeArgs: this.supervisor.nodeArgs,
      env: this.options.hasPool ? { VTPM_POOL_MAX: undefined } : {},
    });
  }

  async start(): Promise<void> {
    await this.startManager();
    await this.startSupervisor();
  }

  /** Knows the other from now on, as its operator does it. @param address where it calls it */
  async know(other: Host, address = other.address()): Promise<void> {
    const identity = await other.installation.ctl('peer', 'identity');
    if (identity.code !== 0) throw new Error(`peer identity: ${identity.stderr}`);
    const file = join(this.installation.directory, `${other.name}.peer`);
    writeFileSync(file, identity.stdout);
    const { endorsement } = await other.identify();
    await this.installation.ctlJson(
      ...['peer', 'add', other.name, file, '--address', address],
      ...['--ek-fingerprint', endorsement.fingerprint],
      '--approve-current',
    );
  }

  #directory(daemon: string): string {
    const path = join(this.installation.directory, `${daemon}-barrier`);
    mkdirSync(path);
    return path;
  }
}

export interface PeerIdentity {
  readonly hostId: string;
  readonly endorsement: { readonly fingerprint: string };
}

export interface HostOptions {
  /** As tmpfs(5) has it, of a file system of its own. */
  readonly homeDisk?: string;
  /** Of its manager. */
  readonly nodeArgs?: string[];
  /** Its supervisor keeps workers ready, as it does unless it is told otherwise. */
  readonly hasPool?: boolean;
}

interface BothOptions extends Partial<Record<HostName, HostOptions>> {
  /** On loopback addresses, where this process reaches them too. */
  readonly isLocal?: boolean;
}

/** Two whole installations, each on a TPM and in a network of its own, that know each other as peers. */
export class TwoHosts {
  private constructor(
    readonly network: TwoNetworks,
    readonly a: Host,
    readonly b: Host,
  ) {}

  /** Both run, and each knows the other. */
  static async create(options: BothOptions = {}): Promise<TwoHosts> {
    const hosts = await TwoHosts.strangers(options);
    await hosts.a.know(hosts.b);
    await hosts.b.know(hosts.a);
    return hosts;
  }

  /** Both run, and neither knows the other. */
  static async strangers(options: BothOptions = {}): Promise<TwoHosts> {
    const network = await (options.isLocal ? TwoNetworks.local() : TwoNetworks.create());
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
