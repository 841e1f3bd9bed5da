import type { ChildProcess } from 'node:child_process';
import { execFileSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { cleanEnvironment, end, REPOSITORY } from './installation.js';
import { InstalledHost } from './installed-host.js';
import { until } from './until.js';

/** Where the package has the commands named swtpm. */
export const PACKAGED_DROPIN = '/usr/lib/vtpm-manager/dropin';

/** What Debian's libvirt-daemon-system would make, of which nothing else is needed. */
const ACCOUNTS = `for group in kvm libvirt-qemu; do getent group $group || groupadd --system $group; done
  getent passwd libvirt-qemu || useradd --system --gid kvm --home-dir /var/lib/libvirt libvirt-qemu`;

/**
 * A host with this project's package and Debian's libvirtd, which runs in the foreground, without D-Bus, AppArmor and networks.
 * libvirt finds `swtpm` as an operator would have it: by a PATH that begins with the drop-in's directory.
 */
export class LibvirtHost {
  readonly host: InstalledHost;
  readonly #directory: string;
  #libvirtd: ChildProcess | undefined;

  private constructor(host: InstalledHost, directory: string) {
    this.host = host;
    this.#directory = directory;
  }

  static async create(): Promise<LibvirtHost> {
    const directory = mkdtempSync(join(tmpdir(), 'vtpm-libvirt-'));
    const host = new LibvirtHost(await InstalledHost.create(), directory);
    try {
      await host.#install();
      await host.#start();
      return host;
    } catch (error) {
      await host.destroy();
      throw error;
    }
  }

  async #install(): Promise<void> {
    const { host } = this;
    const program = [join(REPOSITORY, 'scripts/package.mjs'), '--out', this.#directory];
    const file = execFileSync(process.execPath, program, {
      env: cleanEnvironment(),
      encoding: 'utf8',
    }).trim();
    await host.install(file);
    await host.succeed('sh', '-c', ACCOUNTS);
    // What certificates are signed with belongs to who runs swtpm_setup; here it begins anew.
    await host.succeed(
      'sh',
      '-c',
      'rm -rf /var/lib/swtpm-localca && install -d -o tss -m 750 /var/lib/swtpm-localca',
    );
    await host.succeed('vtpmctl', 'init', '--tpm', 'embedded', '--recovery-key-file', '/root/recovery.key');
    writeFileSync(host.path('/var/lib/vtpm-manager/config.json'), '{ "dropin-users": "tss" }\n');
    await host.succeed('vtpmctl', 'up');
    await host.succeed('vtpmctl', 'image', 'allow', '--installed');
  }

  async #start(): Promise<void> {
    const etc = this.host.path('/etc/libvirt');
    mkdirSync(etc, { recursive: true });
    writeFileSync(
      join(etc, 'qemu.conf'),
      [
        'security_driver = "none"',
        'cgroup_controllers = []',
        'namespaces = []',
        'stdio_handler = "file"',
        '',
      ].join('\n'),
    );
    writeFileSync(
      join(etc, 'libvirtd.conf'),
      ['unix_sock_dir = "/run/libvirt"', 'auth_unix_ro = "none"', 'auth_unix_rw = "none"', ''].join('\n'),
    );
    await this.host.succeed('mkdir', '-p', '/run/libvirt');
    this.#libvirtd = this.host.start(
      'env',
      `PATH=${PACKAGED_DROPIN}:/usr/sbin:/usr/bin:/sbin:/bin`,
      'libvirtd',
    );
    let said = '';
    this.#libvirtd.stderr?.setEncoding('utf8').on('data', (text: string) => {
      said += text;
    });
    await until('libvirtd has its drivers', async () => {
      if (this.#libvirtd?.exitCode !== null) throw new Error(`libvirtd ended: ${said}`);
      return (await this.host.run('virsh', '--connect', 'qemu:///system', 'version')).code === 0;
    });
  }

  virsh(...args: string[]): Promise<string> {
    return this.host.succeed('virsh', '--connect', 'qemu:///system', '--quiet', ...args);
  }

  vtpmctl(...args: string[]): Promise<string> {
    return this.host.succeed('vtpmctl', ...args);
  }

  /** Defines a domain without disks, under TCG: its firmware measures, and finds nothing to boot. */
  async define(name: string, uuid: string, tpm: string): Promise<void> {
    const xml = `<domain type='qemu'>
      <name>${name}</name><uuid>${uuid}</uuid><memory unit='MiB'>128</memory><vcpu>1</vcpu>
      <os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features>
      <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
        <controller type='usb' model='none'/><memballoon model='none'/>${tpm}</devices></domain>`;
    writeFileSync(this.host.path(`/root/${name}.xml`), xml);
    await this.virsh('define', `/root/${name}.xml`);
  }

  async destroy(): Promise<void> {
    await end(this.#libvirtd, 'SIGTERM');
    // Their cgroups are this machine's, and go with the workers.
    await this.host.run('vtpmctl', 'down');
    await this.host.destroy();
    rmSync(this.#directory, { recursive: true, force: true });
  }
}
