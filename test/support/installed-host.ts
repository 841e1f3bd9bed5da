import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { copyFileSync, mkdtempSync, readFileSync, rmdirSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import { cleanEnvironment, type Finished, run } from './installation.js';
import { reapAtExit } from './reap.js';

/** As a shell of root has it: the caller's may lead to the commands of a checkout that this host sees as well. */
const environment = cleanEnvironment({ PATH: '/usr/sbin:/usr/bin:/sbin:/bin', HOME: '/root' });

/**
 * This machine over again, to install packages in: its file system with a layer above it that takes all writes, its own
 * processes, /proc and /run. Mounting takes root, and a test that cannot mount fails and says so. Nothing is left of it.
 */
export class InstalledHost {
  readonly #directory: string;
  readonly #init: ChildProcess;
  readonly #pid: number;

  private constructor(directory: string, init: ChildProcess, pid: number) {
    this.#directory = directory;
    this.#init = init;
    this.#pid = pid;
  }

  static async create(): Promise<InstalledHost> {
    if (process.getuid?.() !== 0) throw new Error('this test mounts a file system: run it as root');
    const directory = mkdtempSync(join(tmpdir(), 'vtpm-host-'));
    const script = `set -e
      mount -t tmpfs -o size=2g tmpfs ${directory}; cd ${directory}; mkdir upper work root
      mount -t overlay -o lowerdir=/,upperdir=$PWD/upper,workdir=$PWD/work overlay root
      mount -t proc proc root/proc; mount --rbind /dev root/dev; mount --rbind /sys root/sys
      mount -t tmpfs tmpfs root/run; mount -t tmpfs tmpfs root/tmp; mkdir -m 1777 root/tmp/packages
      # Not chroot(2): the kernel lets nobody make a user namespace in one.
      cd root; pivot_root . mnt; cd /; umount -l /mnt
      # Reaps what has lost its parent, as the first process of a host does.
      exec bash -c 'echo ready; while :; do sleep 1000 & wait; done'`;
    const init = reapAtExit(
      // It ends with the test, however that ends.
      spawn(
        'setpriv',
        [
          '--pdeathsig',
          'KILL',
          'unshare',
          '--mount',
          '--pid',
          '--fork',
          '--kill-child',
          '--',
          'bash',
          '-c',
          script,
        ],
        {
          stdio: ['ignore', 'pipe', 'inherit'],
        },
      ),
    );
    const [said] = (await Promise.race([once(init.stdout, 'data'), once(init, 'exit')])) as [unknown];
    if (String(said) !== 'ready\n') throw new Error(`no host could be made in ${directory}`);
    const pid = Number(readFileSync(`/proc/${init.pid}/task/${init.pid}/children`, 'utf8'));
    return new InstalledHost(directory, init, pid);
  }

  /** Runs a program in it, in an environment of its own. */
  run(program: string, ...args: string[]): Promise<Finished> {
    return run('nsenter', [...this.#enter(), program, ...args], environment);
  }

  /** @throws Error with both streams where it does not end with 0 @returns its standard output */
  async succeed(program: string, ...args: string[]): Promise<string> {
    const { code, stdout, stderr } = await this.run(program, ...args);
    if (code !== 0) throw new Error(`${program} ${args.join(' ')} ended with ${code}: ${stderr}${stdout}`);
    return stdout;
  }

  /** Installs or upgrades. @returns what dpkg and the maintainer scripts said */
  async install(file: string): Promise<string> {
    const place = this.path(`/tmp/packages/${basename(file)}`);
    copyFileSync(file, place);
    const { code, stdout, stderr } = await this.run(
      'dpkg',
      '--force-unsafe-io',
      '--install',
      `/tmp/packages/${basename(file)}`,
    );
    if (code !== 0) throw new Error(`dpkg ended with ${code}: ${stderr}${stdout}`);
    return `${stdout}${stderr}`;
  }

  start(program: string, ...args: string[]): ChildProcess {
    return reapAtExit(
      spawn('nsenter', [...this.#enter(), program, ...args], {
        stdio: ['ignore', 'ignore', 'pipe'],
        env: environment,
      }),
    );
  }

  /** Of a file in it, from outside. */
  path(inside: string): string {
    return `/proc/${this.#pid}/root${inside}`;
  }

  async destroy(): Promise<void> {
    this.#init.kill('SIGKILL');
    if (this.#init.exitCode === null && this.#init.signalCode === null) await once(this.#init, 'exit');
    rmdirSync(this.#directory);
  }

  #enter(): string[] {
    return ['--target', String(this.#pid), '--mount', '--pid', '--root', '--wd', '--'];
  }
}
