import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { closeSync, readFileSync } from 'node:fs';
import { Socket } from 'node:net';
import { fileURLToPath } from 'node:url';
import { sendDescriptor, socketPair } from 'vtpm-common/libc';
import type { MiniManager } from './mini-manager.js';
import { TpmClient } from './tpm-client.js';

const bundle = new URL('../../../vtpmd/dist/bundle/', import.meta.url);
const image = JSON.parse(readFileSync(new URL('image.json', bundle), 'utf8')) as {
  nodeArguments: string[];
  main: string;
  environment: Record<string, string>;
};

type Message = Record<string, unknown> & { type: string };

/** A real worker, from its bundle, with this test as its supervisor. */
export class WorkerProcess {
  readonly child: ChildProcess;
  /** What it said so far. */
  readonly messages: Message[] = [];
  readonly exited: Promise<{ code: number | null; signal: string | null }>;
  readonly #control: Socket;
  readonly #descriptors: number;
  readonly #manager: MiniManager;
  readonly #waiters: { type: string; resolve: (message: Message) => void }[] = [];
  #nextId = 1;
  log = '';

  /** @param options `program`: what inherits a worker's descriptors in its place */
  constructor(
    manager: MiniManager,
    options: { nodeArguments?: string[]; workerArguments?: string[]; program?: string } = {},
  ) {
    this.#manager = manager;
    const [linkHere, linkThere] = socketPair();
    const [controlHere, controlThere] = socketPair();
    const [descriptorsHere, descriptorsThere] = socketPair();
    manager.accept(new Socket({ fd: linkHere }));
    this.#control = new Socket({ fd: controlHere });
    this.#descriptors = descriptorsHere;
    const path = options.program ?? fileURLToPath(new URL(image.main, bundle));
    this.child = spawn(
      process.execPath,
      [...image.nodeArguments, ...(options.nodeArguments ?? []), path, ...(options.workerArguments ?? [])],
      {
        env: { ...image.environment, PATH: process.env.PATH },
        stdio: ['ignore', 'ignore', 'pipe', linkThere, controlThere, descriptorsThere],
      },
    );
    for (const fd of [linkThere, controlThere, descriptorsThere]) closeSync(fd);
    this.child.stderr!.setEncoding('utf8').on('data', (text: string) => {
      this.log += text;
    });
    this.exited = once(this.child, 'exit').then(([code, signal]) => ({
      code: code as number | null,
      signal: signal as string | null,
    }));
    let pending = '';
    this.#control.setEncoding('utf8').on('data', (chunk: string) => {
      pending += chunk;
      const lines = pending.split('\n');
      pending = lines.pop()!;
      for (const line of lines) this.#heard(JSON.parse(line) as Message);
    });
    this.#control.on('error', () => {});
  }

  /** The first message of this type, whether it came already or not. */
  async heard(type: string): Promise<Message> {
    return this.messages.find((message) => message.type === type) ?? this.next(type);
  }

  /** The next message of this type. */
  next(type: string): Promise<Message> {
    return new Promise((resolve) => this.#waiters.push({ type, resolve }));
  }

  send(message: object): void {
    this.#control.write(`${JSON.stringify(message)}\n`);
  }

  /** Loads the vTPM and waits until the doors may open. */
  async serve(startup: 'clear' | 'none' = 'clear', outage?: object): Promise<this> {
    const { publicKey } = await this.heard('ready');
    this.send({ ...this.#manager.identity(publicKey as string, startup), outage });
    await this.heard('serving');
    return this;
  }

  /** A guest's connection through a door. */
  connect(door: 'tpm' | 'tcti' | 'tcti-ctrl', peer?: number): TpmClient {
    const [here, there] = socketPair();
    this.pass(door, there, peer);
    return new TpmClient(new Socket({ fd: here, allowHalfOpen: true }));
  }

  /** Hands a copy of `fd` over. */
  passCopy(door: string, fd: number, peer?: number): void {
    sendDescriptor(this.#descriptors, fd);
    this.send({ type: 'connection', door, id: this.#nextId++, peer });
  }

  /** Hands `fd` over and closes it here. */
  pass(door: string, fd: number, peer?: number): void {
    this.passCopy(door, fd, peer);
    closeSync(fd);
  }

  /** A new link to the manager. */
  relink(): void {
    const [here, there] = socketPair();
    this.#manager.accept(new Socket({ fd: here }));
    sendDescriptor(this.#descriptors, there);
    closeSync(there);
    this.send({ type: 'link' });
  }

  /** As if the supervisor had died. */
  abandon(): void {
    this.#control.destroy();
  }

  async kill(): Promise<void> {
    if (this.child.exitCode === null && this.child.signalCode === null) this.child.kill('SIGKILL');
    await this.exited;
    this.#control.destroy();
    try {
      closeSync(this.#descriptors);
    } catch {
      // Closed by an earlier kill.
    }
  }

  #heard(message: Message): void {
    this.messages.push(message);
    const matching = this.#waiters.filter(({ type }) => type === message.type);
    for (const waiter of matching) {
      this.#waiters.splice(this.#waiters.indexOf(waiter), 1);
      waiter.resolve(message);
    }
  }
}
