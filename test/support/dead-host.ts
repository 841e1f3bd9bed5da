import assert from 'node:assert/strict';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type { Finished } from './installation.js';
import { type Host, TwoHosts } from './two-hosts.js';

/** Two hosts, a vTPM `web1` on the one that dies, and a backup of it that is not its newest state. */
export class DeadHost {
  private constructor(
    readonly hosts: TwoHosts,
    private readonly secret: string,
    private readonly backup: string,
    private readonly id: string,
  ) {}

  static async create(): Promise<DeadHost> {
    const hosts = await TwoHosts.create();
    const { a, b } = hosts;
    const { directory } = b.installation;
    const [secret, backup] = [join(directory, 'backup.key'), join(directory, 'a.backup')];
    await a.installation.vtpm('web1', '--autostart');
    await write(a, 'in-the-backup');
    const key = await b.installation.ctlJson('backup', 'keygen', '-o', secret);
    await a.installation.ctlJson('backup', '--to', String(key.public), '-o', backup);
    await write(a, 'lost-with-it');
    return new DeadHost(hosts, secret, backup, String((await a.installation.ctlJson('show', 'web1')).id));
  }

  /** Dies. */
  get a(): Host {
    return this.hosts.a;
  }

  /** Rescues. */
  get b(): Host {
    return this.hosts.b;
  }

  async die(): Promise<void> {
    await this.a.installation.killSupervisor();
    await this.a.installation.killManager();
  }

  /** With a new statement. */
  async rescue(...flags: string[]): Promise<Finished> {
    const { installation } = this.b;
    const fencing = join(installation.directory, 'web1.fencing');
    const fence = await installation.ctl(
      ...['migrate', 'fence', '--vtpm', this.id, '--host', 'a'],
      ...['--last-generation', '1000', '--method', 'its processes were killed'],
    );
    assert.equal(fence.code, 0, fence.stderr);
    writeFileSync(fencing, fence.stdout);
    return await installation.ctl(
      ...['migrate', 'rescue', 'web1', '--from-backup', this.backup, '--operator-key', this.secret],
      ...['--fencing', fencing, ...flags],
    );
  }

  async stateOn(host: Host) {
    const { state, movedTo, marks } = await host.installation.ctlJson('show', 'web1');
    return { state, movedTo, marks };
  }

  /** The host that was dead knows where it lives. */
  async isGivenUp(): Promise<boolean> {
    const { state, movedTo } = await this.stateOn(this.a);
    return state === 'moved' && movedTo === 'b';
  }
}

/** What the guest keeps. */
async function write(host: Host, text: string): Promise<void> {
  const file = join(host.installation.directory, 'nv');
  writeFileSync(file, text);
  const script = `tpm2_nvreadpublic 0x1500016 >/dev/null 2>&1 || tpm2_nvdefine -Q 0x1500016 -C o -s 13; tpm2_nvwrite -Q 0x1500016 -C o -i ${file}`;
  const done = await host.installation.ctl('exec', 'web1', '--', 'sh', '-c', script);
  assert.equal(done.code, 0, done.stderr);
}
