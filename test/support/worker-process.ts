import { type ChildProcess, spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { closeSync, readFileSync, readSync, writeSync } from 'node:fs';
import { Socket } from 'node:net';
import { fileURLToPath } from 'node:url';
import { CHECKPOINT_LAYOUT } from 'vtpm-common/checkpoint-layout';
import {
  pipePair,
  receiveDescriptor,
  sendDescriptor,
  setPipeRoom,
  sharedMemory,
  socketPair,
} from 'vtpm-common/libc';
import type { Verb } from 'vtpm-proto';
import type { MiniManager } from './mini-manager.js';
import { TpmClient } from './tpm-client.js';

const bundle = new URL('../../../vtpmd/dist/bundle/', import.meta.url);
const image = JSON.parse(readFileSync(new URL('image.json', bundle), 'utf8')) as {
  nodeArguments: string[];
  main: string;
  environment: Record<string, string>;
};

const FIRST_FILTER = fileURLToPath(new URL('./first-filter.js', import.meta.url));
/** It takes what the sandbox would not give it. */
const hasMore = Number.parseInt(process.versions.node, 10) > 20;

type Message = Record<string, unknown> & { type: string };

/** What a supervisor keeps of a connection that outlives its worker. */
export interface KeptVisit {
  readonly door: string;
  readonly id: number;
  readonly fd: number;
}

/** A connection that outlives its worker, with its client. */
export interface KeptGuest extends KeptVisit {
  readonly client: TpmClient;
}

/** What a supervisor keeps over the workers of one VM run, in the hands of a test. */
export class KeptRun {
  readonly memory = sharedMemory('vtpm-checkpoint', CHECKPOINT_LAYOUT.bytes);
  readonly pipe = pipePair();
  readonly controlPipe: { readonly read: number; readonly write: number } | undefined;
  /** What a VMM gave as its data channel. */
  dataChannel: KeptVisit | undefined;
  /** What the ticket grants beside going on. */
  verbs: readonly Verb[] = [];
  /** Of a worker that goes on. */
  startup: 'clear' | 'none' = 'clear';
  nextId = 1;
  #isClosed = false;

  /** @param power who powers the TPM */
  constructor(
    readonly power: 'on' | 'vmm' = 'on',
    controlRoom = 256 * 1024,
    readonly vmRunId = randomBytes(16),
  ) {
    this.controlPipe = power === 'vmm' ? pipePair() : undefined;
    if (this.controlPipe) setPipeRoom(this.controlPipe.write, controlRoom);
  }

  get descriptors(): readonly number[] {
    const pipes = this.controlPipe ? [this.pipe, this.controlPipe] : [this.pipe];
    return [this.memory, ...pipes.flatMap(({ read, write }) => [read, write])];
  }

  /** All of the memory. */
  image(): Buffer {
    const bytes = Buffer.alloc(CHECKPOINT_LAYOUT.bytes);
    readSync(this.memory, bytes, 0, bytes.length, 0);
    return bytes;
  }

  put(image: Buffer): void {
    writeSync(this.memory, image, 0, image.length, 0);
  }

  /** Offset of the slot with the newest checkpoint. */
  newestSlot(): number {
    const image = this.image();
    const sequence = (offset: number): bigint => image.readBigUInt64LE(offset);
    return CHECKPOINT_LAYOUT.slots.reduce<number>(
      (newest, offset) => (sequence(offset) > sequence(newest) ? offset : newest),
      CHECKPOINT_LAYOUT.slots[0],
    );
  }

  newest(): number {
    return Number(this.image().readBigUInt64LE(this.newestSlot()));
  }

  close(): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    for (const fd of this.descriptors) closeSync(fd);
  }
}

/** A real worker, from its bundle, with this test as its supervisor. */
export class WorkerProcess {
  readonly child: ChildProcess;
  /** What it said so far. */
  readonly messages: Message[] = [];
  /** Hears each message, too. */
  onMessage: (message: Message) => void = () => {};
  readonly exited: Promise<{ code: number | null; signal: string | null }>;
  readonly #control: Socket;
  readonly #descriptors: number;
  readonly #manager: MiniManager;
  readonly #waiters: { type: string; resolve: (message: Message) => void }[] = [];
  readonly #vmmConnections = new Map<number, number>();
  #run: KeptRun | undefined;
  readonly #ids = new WeakMap<TpmClient, number>();
  #nextId = 1;
  #isKilled = false;
  log = '';

  /**
   * @param options `program`: another worker; `relay`: what inherits a worker's descriptors in its place, and gets no filter;
   * `wrapper`: a program that executes the rest of its arguments
   */
  constructor(
    manager: MiniManager,
    options: {
      nodeArguments?: string[];
      workerArguments?: string[];
      program?: string;
      relay?: string;
      wrapper?: string[];
    } = {},
  ) {
    this.#manager = manager;
    const [linkHere, linkThere] = socketPair();
    const [controlHere, controlThere] = socketPair();
    const [descriptorsHere, descriptorsThere] = socketPair();
    manager.accept(new Socket({ fd: linkHere }));
    this.#control = new Socket({ fd: controlHere });
    this.#descriptors = descriptorsHere;
    const path = options.relay ?? options.program ?? fileURLToPath(new URL(image.main, bundle));
    const worker = [...image.nodeArguments, ...(options.nodeArguments ?? []), path];
    const needsFilter = hasMore && options.relay === undefined;
    const [command = process.execPath, ...rest] = [...(options.wrapper ?? []), process.execPath];
    this.child = spawn(
      command,
      [...rest, ...(needsFilter ? [FIRST_FILTER] : []), ...worker, ...(options.workerArguments ?? [])],
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

  /** Begins a VM run that outlives this worker. @param keeps checkpoints */
  async begin(
    run: KeptRun,
    startup: 'clear' | 'none' = 'clear',
    outage?: object,
    keeps = true,
  ): Promise<this> {
    await this.#identify(run, { keeps, resumes: null }, startup, outage);
    await this.heard('serving');
    return this;
  }

  /**
   * Is to go on where the worker before it ended, with its connections.
   * @param newest as the supervisor saw it @returns what it says: `serving`, or why it cannot
   */
  async goOn(
    run: KeptRun,
    guests: readonly KeptVisit[] = [],
    newest = run.newest(),
    outage?: object,
  ): Promise<Message> {
    const all = run.dataChannel ? [...guests, run.dataChannel] : guests;
    const resumes = { newest, connections: all.length };
    await this.#identify(run, { keeps: true, resumes }, run.startup, outage);
    this.passKept(all);
    return Promise.race([this.heard('serving'), this.heard('failed')]);
  }

  /** Holds the VMM's connections while the TPM is on its way. With `goOn` or `arrive` the same process has it. */
  async standIn(
    run: KeptRun,
    kind: 'away' | 'incoming',
    guests: readonly KeptVisit[] = [],
    more: { readonly refused?: string; readonly outage?: object } = {},
  ): Promise<this> {
    this.#run = run;
    const all = run.dataChannel ? [...guests, run.dataChannel] : guests;
    await this.heard('ready');
    for (const fd of run.descriptors) sendDescriptor(this.#descriptors, fd);
    const checkpoint = { keeps: false, control: true, resumes: { newest: 0, connections: all.length } };
    this.send({ ...{ type: 'stand-in', kind, bufferSize: 0 }, ...more, checkpoint });
    this.passKept(all);
    await this.heard('standing-in');
    return this;
  }

  /** The vTPM comes from another host, with its VMM. @returns as `goOn` */
  async arrive(run: KeptRun, guests: readonly KeptVisit[]): Promise<Message> {
    const all = run.dataChannel ? [...guests, run.dataChannel] : guests;
    const resumes = { newest: 0, connections: all.length };
    await this.#identify(run, { keeps: true, resumes }, 'none', undefined, { arrives: true });
    this.passKept(all);
    return Promise.race([this.heard('serving'), this.heard('failed')]);
  }

  /** Answers failure in the place of the worker before it. */
  async beLost(run: KeptRun, guests: readonly KeptVisit[] = []): Promise<this> {
    this.#run = run;
    const all = run.dataChannel ? [...guests, run.dataChannel] : guests;
    await this.heard('ready');
    for (const fd of run.descriptors) sendDescriptor(this.#descriptors, fd);
    const resumes = { newest: run.newest(), connections: all.length };
    this.send({
      type: 'lost',
      checkpoint: { keeps: false, control: run.controlPipe !== undefined, resumes },
    });
    this.passKept(all);
    await this.heard('lost');
    return this;
  }

  /** A connection that the test keeps, as the supervisor does. */
  connectKept(run: KeptRun, door = 'tpm'): KeptGuest {
    const guest = makeKept(run, door);
    this.#ids.set(guest.client, guest.id);
    this.passKept([guest]);
    return guest;
  }

  passKept(guests: readonly KeptVisit[]): void {
    for (const { door, id, fd } of guests) {
      if (door === 'control' || door === 'vmm-data') this.#vmmConnections.set(id, fd);
      sendDescriptor(this.#descriptors, fd);
      this.send({ type: 'connection', door, id });
    }
  }

  async #identify(
    run: KeptRun,
    checkpoint: { readonly keeps: boolean; readonly resumes: object | null },
    startup: 'clear' | 'none',
    outage?: object,
    more?: object,
  ): Promise<void> {
    this.#run = run;
    const { publicKey } = await this.heard('ready');
    for (const fd of run.descriptors) sendDescriptor(this.#descriptors, fd);
    const start: Verb[] = checkpoint.resumes === null ? ['COLD', 'RESUME'] : ['RESUME'];
    const verbs: Verb[] = [
      ...(this.#manager.saves.length === 0 ? ['MANUFACTURE' as const] : start),
      ...run.verbs,
    ];
    const identity = this.#manager.identity(publicKey as string, startup, verbs, run.vmRunId);
    this.send({
      ...{ ...identity, power: run.power, outage },
      ...more,
      checkpoint: { ...checkpoint, control: run.controlPipe !== undefined },
    });
  }

  /** A guest's connection through a door. */
  connect(door: 'tpm' | 'tcti' | 'tcti-ctrl', peer?: number): TpmClient {
    const [here, there] = socketPair();
    const client = new TpmClient(new Socket({ fd: here, allowHalfOpen: true }));
    this.#ids.set(client, this.#nextId);
    this.pass(door, there, peer);
    return client;
  }

  /**
   * A round trip over the control channel of the tcti door: what was sent before has been read, and what the worker does
   * at once it has done.
   */
  async turn(): Promise<void> {
    const control = this.connect('tcti-ctrl');
    control.send('00000001');
    await control.bytes(8);
    control.close();
  }

  /** Resolves when the worker has closed its end of that connection. */
  async closed(client: TpmClient): Promise<void> {
    const id = this.#ids.get(client);
    const isClosed = (message: Message) => message.type === 'connection-closed' && message.id === id;
    while (!this.messages.some(isClosed)) await this.next('connection-closed');
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
    // By a second one the number may be another descriptor's.
    if (!this.#isKilled) closeSync(this.#descriptors);
    this.#isKilled = true;
  }

  /** As the supervisor does. */
  #keepDataChannel(): void {
    const run = this.#run;
    const fd = receiveDescriptor(this.#descriptors);
    if (!run || fd === undefined) throw new Error('a data channel without a run or a descriptor');
    run.dataChannel = { door: 'vmm-data', id: run.nextId++, fd };
    this.passKept([run.dataChannel]);
  }

  /** As the supervisor does, for the connections of a VMM. */
  #forget(id: number): void {
    const fd = this.#vmmConnections.get(id);
    if (fd !== undefined) closeSync(fd);
    this.#vmmConnections.delete(id);
    if (this.#run?.dataChannel?.id === id) this.#run.dataChannel = undefined;
  }

  #heard(message: Message): void {
    if (message.type === 'data-channel') this.#keepDataChannel();
    if (message.type === 'connection-closed') this.#forget(Number(message.id));
    this.messages.push(message);
    this.onMessage(message);
    const matching = this.#waiters.filter(({ type }) => type === message.type);
    for (const waiter of matching) {
      this.#waiters.splice(this.#waiters.indexOf(waiter), 1);
      waiter.resolve(message);
    }
  }
}

/** A connection that no worker has yet. */
export function makeKept(run: KeptRun, door: string): KeptGuest {
  const [here, there] = socketPair();
  const client = new TpmClient(new Socket({ fd: here, allowHalfOpen: true }));
  return { door, id: run.nextId++, fd: there, client };
}
