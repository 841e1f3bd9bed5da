import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { createConnection, type Socket } from 'node:net';
import { until } from './until.js';

const QEMU = 'qemu-system-x86_64';

/** A VM of unmodified QEMU, under TCG, without an operating system unless it is given one. */
export class QemuVm {
  readonly child: ChildProcess;
  readonly exited: Promise<number | null>;
  output = '';
  readonly #monitorPath: string;
  #monitor: Socket | undefined;
  #said = '';

  /** @param control path of control.sock @param monitor path of a socket that is made */
  constructor(
    control: string,
    monitor: string,
    { device = 'tpm-crb', args = [] }: { device?: 'tpm-crb' | 'tpm-tis'; args?: readonly string[] } = {},
  ) {
    this.#monitorPath = monitor;
    const tpm = [
      ...['-chardev', `socket,id=c,path=${control}`],
      ...['-tpmdev', 'emulator,id=t,chardev=c', '-device', `${device},tpmdev=t`],
    ];
    const machine = ['-M', 'q35,accel=tcg', '-m', '128', '-display', 'none', '-nodefaults'];
    // What the firmware says, where nobody else talks.
    const debug = args.includes('-serial')
      ? []
      : ['-debugcon', 'stdio', '-global', 'isa-debugcon.iobase=0x402'];
    this.child = spawn(
      QEMU,
      [...machine, ...debug, ...tpm, '-monitor', `unix:${monitor},server,nowait`, ...args],
      {
        stdio: ['ignore', 'pipe', 'pipe'],
      },
    );
    for (const stream of [this.child.stdout, this.child.stderr]) {
      stream?.setEncoding('utf8').on('data', (text: string) => {
        this.output += text;
      });
    }
    this.exited = once(this.child, 'exit').then(([code]) => code as number | null);
  }

  /** Its guest, an operating system that takes its time. */
  says(pattern: RegExp): Promise<RegExpExecArray> {
    return until(
      `the guest says ${pattern}`,
      () => {
        const found = pattern.exec(this.output);
        if (!found && this.child.exitCode !== null)
          throw new Error(`QEMU ended: ${this.output.slice(-4000)}`);
        return found ?? undefined;
      },
      240_000,
    );
  }

  /** A command of the human monitor; resolves with what it says. */
  async monitor(command: string): Promise<string> {
    this.#monitor ??= await this.#connect();
    const from = this.#said.length;
    this.#monitor.write(`${command}\n`);
    return until(`the monitor says something to "${command}"`, () => {
      const said = this.#said.slice(from);
      return /\(qemu\) $/.test(said) ? said : undefined;
    });
  }

  /** @returns the exit status */
  async quit(): Promise<number | null> {
    this.#monitor ??= await this.#connect();
    this.#monitor.write('quit\n');
    return this.exited;
  }

  async kill(): Promise<void> {
    this.#monitor?.destroy();
    if (this.child.exitCode === null && this.child.signalCode === null) this.child.kill('SIGKILL');
    await this.exited;
  }

  async #connect(): Promise<Socket> {
    const socket = await until('the monitor is there', async () => {
      if (this.child.exitCode !== null) throw new Error(`QEMU ended: ${this.output}`);
      const trial = createConnection(this.#monitorPath);
      const isThere = await Promise.race([
        once(trial, 'connect').then(() => true),
        once(trial, 'error').then(() => false),
      ]).catch(() => false);
      return isThere ? trial : undefined;
    });
    socket.on('error', () => {});
    socket.setEncoding('utf8').on('data', (text: string) => {
      this.#said += text;
    });
    await until('the monitor prompts', () => /\(qemu\) $/.test(this.#said));
    return socket;
  }
}
