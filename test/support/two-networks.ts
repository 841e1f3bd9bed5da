import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { freePort } from './free-port.js';
import { Line } from './line.js';
import { reapAtExit } from './reap.js';

const LINK = 'vt0';

/** Where one host is in its network. */
export interface Place {
  readonly v4: string;
  /** Undefined where this machine has no IPv6. */
  readonly v6: string | undefined;
  /** Where its manager listens. */
  readonly port: number;
  /** Where others reach that. */
  readonly reachedAt: number;
  /** A program with its arguments that runs another one there. */
  readonly under: readonly string[];
}

/**
 * Two places with addresses of their own that reach each other: a network namespace each, joined by one link. Nothing of them
 * is in the namespace of the test, and they end with it however it ends. Where namespaces are not permitted, they are
 * two loopback addresses with a line of this process to each.
 */
export class TwoNetworks {
  private constructor(
    readonly places: readonly [Place, Place],
    private readonly holders: readonly ChildProcess[],
    private readonly lines: readonly Line[],
  ) {}

  static async create(): Promise<TwoNetworks> {
    if (process.getuid?.() === 0) {
      const holders = [await holdNamespace(), await holdNamespace()] as const;
      return TwoNetworks.#joined(holders);
    }
    console.log('      network namespaces take root: the two hosts are two loopback addresses');
    return TwoNetworks.local();
  }

  static async local(): Promise<TwoNetworks> {
    const lines: Line[] = [];
    const placed = async (v4: string): Promise<Place> => {
      const place = await loopbackPlace(v4);
      const line = await Line.to([v4, ...(place.v6 ? [place.v6] : [])], place.port);
      lines.push(line);
      return { ...place, reachedAt: line.port };
    };
    const places = [await placed('127.0.0.2'), await placed('127.0.0.3')] as const;
    return new TwoNetworks(places, [], lines);
  }

  static #joined(holders: readonly [ChildProcess, ChildProcess]): TwoNetworks {
    const enter = holders.map(({ pid }) => ['nsenter', `--net=/proc/${pid}/ns/net`, '--']);
    const [here = [], there = []] = enter;
    const end = ['type', 'veth', 'peer', 'name', LINK, 'netns', String(holders[1].pid)];
    runIn(here, 'ip', 'link', 'add', LINK, ...end);
    const places = [here, there].map((under, index): Place => {
      const [v4, v6] = [`192.0.2.${index + 1}`, `2001:db8::${index + 1}`];
      for (const device of ['lo', LINK]) runIn(under, 'ip', 'link', 'set', device, 'up');
      runIn(under, 'ip', 'address', 'add', `${v4}/24`, 'dev', LINK);
      return { v4, v6: addV6(under, v6) ? v6 : undefined, port: 7799, reachedAt: 7799, under };
    });
    return new TwoNetworks(places as [Place, Place], holders, []);
  }

  /** No packet comes through any more, and nobody is told. */
  cut(): void {
    for (const line of this.lines) line.cut();
    if (this.holders.length > 0) runIn(this.places[0].under, 'ip', 'link', 'set', LINK, 'down');
  }

  heal(): void {
    for (const line of this.lines) line.heal();
    if (this.holders.length === 0) return;
    const { under, v6 } = this.places[0];
    runIn(under, 'ip', 'link', 'set', LINK, 'up');
    // The kernel takes it from a link that goes down.
    if (v6) addV6(under, v6);
  }

  async destroy(): Promise<void> {
    for (const line of this.lines) line.close();
    for (const holder of this.holders) {
      const gone = once(holder, 'exit');
      holder.kill('SIGKILL');
      await gone;
    }
  }
}

function addV6(under: readonly string[], address: string): boolean {
  try {
    // Without the check for duplicates it can be used at once.
    runIn(under, 'ip', '-6', 'address', 'replace', `${address}/64`, 'dev', LINK, 'nodad');
    return true;
  } catch {
    console.log('      this machine has no IPv6');
    return false;
  }
}

function runIn(under: readonly string[], ...command: string[]): void {
  const [program = '', ...args] = [...under, ...command];
  execFileSync(program, args, { stdio: ['ignore', 'ignore', 'pipe'] });
}

/** A network namespace lives as long as a process in it. */
async function holdNamespace(): Promise<ChildProcess> {
  const held = ['unshare', '--net', '--', 'sh', '-c', 'echo ready; exec sleep infinity'];
  const holder = reapAtExit(
    spawn('setpriv', ['--pdeathsig', 'KILL', ...held], { stdio: ['ignore', 'pipe', 'inherit'] }),
  );
  const [said] = (await Promise.race([once(holder.stdout, 'data'), once(holder, 'exit')])) as [unknown];
  if (String(said) !== 'ready\n') throw new Error('no network namespace could be made');
  return holder;
}

/** One that every process of this machine reaches. */
export async function loopbackPlace(v4: string): Promise<Place> {
  const port = await freePort(v4, '::1');
  return { v4, v6: '::1', port, reachedAt: port, under: [] };
}
