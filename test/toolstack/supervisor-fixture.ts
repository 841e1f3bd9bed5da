import { type ChildProcess, spawn } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import { once } from 'node:events';
import { copyFileSync, mkdirSync, mkdtempSync, readdirSync, rmSync, statSync, writeFileSync } from 'node:fs';
import {
  createServer as createHttpServer,
  type IncomingMessage,
  request,
  type ServerResponse,
} from 'node:http';
import { createRequire } from 'node:module';
import { createConnection, createServer, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { build } from 'esbuild';
import { type Paths, pathsOf, VERSION } from 'vtpm-common';
import {
  type Delegation,
  decode,
  signDelegation,
  signingKeyFromSeed,
  type Ticket,
  uuidToBytes,
  type Verb,
  verifyTicketChain,
} from 'vtpm-proto';
import { type ProcessId, processId } from 'vtpm-toolstack/supervisor/processes';

export const toolstackKey = signingKeyFromSeed(Buffer.alloc(32, 7));
export const OTHER_HOST = 'cd'.repeat(32);
export const MANAGER_ID = 'ab'.repeat(32);

/** A short path: a unix socket takes 107 bytes. */
export function temporaryDirectory(): string {
  return mkdtempSync(join(tmpdir(), 'vtpm-'));
}

/** Makes the image of stub-worker.ts as the worker's own build does. @returns path of the manifest */
export async function buildStubImage(
  directory: string,
  environment: Readonly<Record<string, string>> = {},
): Promise<string> {
  mkdirSync(join(directory, 'node_modules'), { recursive: true });
  await build({
    entryPoints: [fileURLToPath(new URL('./stub-worker.js', import.meta.url))],
    outfile: join(directory, 'stub.mjs'),
    bundle: true,
    platform: 'node',
    format: 'esm',
    banner: { js: "import{createRequire as __cr}from'node:module';const require=__cr(import.meta.url);" },
    logLevel: 'warning',
  });
  const addon = createRequire(import.meta.url).resolve(`@koromix/koffi-linux-${process.arch}`);
  copyFileSync(
    join(dirname(addon), `linux_${process.arch}`, 'koffi.node'),
    join(directory, 'node_modules/koffi.node'),
  );
  return writeManifest(directory, ['stub.mjs', 'node_modules/koffi.node'], {
    environment: { MALLOC_ARENA_MAX: '1', ...environment },
  });
}

export function writeManifest(
  directory: string,
  files: string[],
  change: Partial<Record<string, unknown>> = {},
): string {
  const path = join(directory, 'image.json');
  const manifest = {
    format: 1,
    version: VERSION,
    files: files.map((name) => ({ name, source: name, target: `/app/${name}` })),
    libraries: ['libc.so.6'],
    nodeArguments: ['--no-warnings'],
    main: files[0],
    environment: { MALLOC_ARENA_MAX: '1' },
    ...change,
  };
  writeFileSync(path, JSON.stringify(manifest));
  return path;
}

export interface StubRecord {
  vmUuid: string;
  kind: 'live' | 'retired' | 'moved';
  epoch: number;
  generation: number;
  isSuspended?: boolean;
  migrating?: boolean;
}

/** The manager's side of the contract: the admin plane, and a worker socket that loads by compare-and-set on the epoch. */
export class StubManager {
  readonly records = new Map<string, StubRecord>();
  readonly tickets: Ticket[] = [];
  /** Digests that it allows, as far as it is asked; it looks at no ticket's. */
  readonly images = new Set<string>();
  /** How often it was asked for what it knows of a vTPM. */
  asked = 0;
  /** Of each Load, the memory for checkpoints that the worker has. */
  readonly memories: (number | undefined)[] = [];
  status = 'ready';
  /** The next Load is answered with this refusal. */
  refuse: { reason: string; message: string } | undefined;
  /** While a worker waits for it: it executes all of its image and has no identity. */
  beforeGreeting: (() => Promise<void>) | undefined;
  /** A Load is answered when this resolves. */
  beforeLoad: ((ticket: Ticket) => Promise<void>) | undefined;
  /** Of migrations, what it tells. */
  readonly migrations = new Map<string, { state: string; mode?: string; incoming?: object }>();
  /** It tells of its peers when this resolves. */
  beforePeers: (() => Promise<void>) | undefined;
  /** How often it was asked for one. */
  askedForMigrations = 0;
  /** What it was told of them: `accept`, `refuse` or `cancel`. */
  onAnswer: (migration: string, verb: string, body: { code?: string; message?: string }) => void = () => {};
  readonly #listeners = new Set<ServerResponse>();
  readonly #links = new Set<Socket>();
  readonly #paths: Paths;
  #close: (() => Promise<void>)[] = [];
  #drop: () => void = () => {};

  constructor(paths: Paths) {
    this.#paths = paths;
  }

  async start(): Promise<void> {
    mkdirSync(dirname(this.#paths.manager.workerSocket), { recursive: true });
    const admin = createHttpServer((call, response) => {
      if (call.url?.startsWith('/events?')) {
        response.writeHead(200);
        response.write(`${JSON.stringify({ type: 'hello', instance: 'x' })}\n`);
        this.#listeners.add(response);
        response.on('close', () => this.#listeners.delete(response));
        return;
      }
      if (call.url === '/peers') {
        void Promise.resolve(this.beforePeers?.()).then(() =>
          response.end(JSON.stringify({ peers: [{ name: 'other', hostId: OTHER_HOST }] })),
        );
        return;
      }
      if (call.url === '/images') {
        response.end(JSON.stringify({ images: [...this.images].map((digest) => ({ digest })) }));
        return;
      }
      if (call.url?.startsWith('/migrations')) {
        void this.#tellOfMigrations(call, response);
        return;
      }
      if (call.url?.startsWith('/vtpms/')) this.asked++;
      const record = this.records.get(call.url?.slice('/vtpms/'.length) ?? '');
      const refusal =
        this.status === 'locked'
          ? { code: 'locked', message: 'the platform changed' }
          : this.status === 'shutting-down'
            ? { code: 'shutting-down', message: 'the manager is shutting down' }
            : { code: 'unknown-vtpm', message: 'none' };
      const body =
        call.url === '/health'
          ? { status: this.status, managerId: MANAGER_ID, message: 'the platform changed' }
          : (this.status === 'ready' && record) || { error: refusal };
      response.writeHead('error' in body ? 404 : 200).end(JSON.stringify(body));
    });
    const worker = createServer((link) => this.#serve(link));
    await once(admin.listen(this.#paths.manager.adminSocket), 'listening');
    await once(worker.listen(this.#paths.manager.workerSocket), 'listening');
    this.#close = [admin, worker].map(
      (server) => () => new Promise((resolve) => server.close(() => resolve())),
    );
    this.#drop = () => {
      admin.closeAllConnections();
      for (const link of this.#links) link.destroy();
    };
  }

  emit(event: object): void {
    for (const listener of this.#listeners) listener.write(`${JSON.stringify(event)}\n`);
  }

  async #tellOfMigrations(call: IncomingMessage, response: ServerResponse): Promise<void> {
    let body = '';
    for await (const chunk of call) body += String(chunk);
    const [, , id = '', verb] = (call.url ?? '').split('/');
    if (call.method === 'POST') {
      this.onAnswer(id, verb ?? '', JSON.parse(body) as object);
      response.end('{}');
      return;
    }
    if (id) this.askedForMigrations++;
    const all = [...this.migrations].map(([migration, more]) => ({ migration, ...more }));
    const found = all.find(({ migration }) => migration === id);
    const error = { error: { code: 'unknown-migration', message: 'none' } };
    response.writeHead(id && !found ? 404 : 200);
    response.end(JSON.stringify(id ? (found ?? error) : { migrations: all }));
  }

  async stop(): Promise<void> {
    // Nobody listens any more before the first link is cut, as when a process ends.
    const closed = this.#close.splice(0).map((close) => close());
    this.#drop();
    await Promise.all(closed);
  }

  #serve(link: Socket): void {
    this.#links.add(link);
    link.on('error', () => {});
    link.on('close', () => this.#links.delete(link));
    void this.#greet(link);
    link.setEncoding('utf8');
    link.on('data', (line: string) => {
      void this.#load(JSON.parse(line)).then((answer) => link.write(`${JSON.stringify(answer)}\n`));
    });
  }

  async #greet(link: Socket): Promise<void> {
    await this.beforeGreeting?.();
    link.write(`${JSON.stringify({ type: 'greeting' })}\n`);
  }

  async #load({
    ticket: text,
    managerKey,
    memory,
  }: {
    ticket: string;
    managerKey: string;
    memory?: number;
  }): Promise<object> {
    const { ticket, vtpmUuid } = verifyTicketChain(decode('SignedTicket', Buffer.from(text, 'base64')));
    this.tickets.push(ticket);
    this.memories.push(memory);
    if (managerKey !== MANAGER_ID) return { type: 'failed', reason: 'wrong-manager', message: managerKey };
    await this.beforeLoad?.(ticket);
    if (this.refuse) return { type: 'failed', ...this.refuse };
    if (this.status !== 'ready') return { type: 'failed', reason: this.status, message: 'not now' };
    const record = this.records.get(vtpmUuid) ?? { vmUuid: '', kind: 'live', epoch: 0, generation: 0 };
    if (BigInt(record.epoch) !== ticket.expectedEpoch) {
      return { type: 'failed', reason: 'stale-epoch', message: 'another epoch owns the vTPM' };
    }
    const vmUuid = Buffer.from(ticket.vmUuid)
      .toString('hex')
      .replace(/^(.{8})(.{4})(.{4})(.{4})(.*)$/, '$1-$2-$3-$4-$5');
    const loaded = { ...record, vmUuid, epoch: record.epoch + 1, generation: record.generation + 1 };
    this.records.set(vtpmUuid, loaded);
    return { type: 'serving', epoch: loaded.epoch, generation: loaded.generation };
  }
}

export interface Answer {
  status: number;
  // biome-ignore lint/suspicious/noExplicitAny: what a test expects of it is the test.
  body: any;
}

export const SUPERVISOR = fileURLToPath(
  new URL('../../../toolstack/bin/vtpm-supervisord.js', import.meta.url),
);

/** A real vtpm-supervisord. */
export class SupervisorProcess {
  readonly paths: Paths;
  readonly #child: ChildProcess;
  #stderr = '';

  /** @param how what is executed, and `wrapper`: a program that executes the rest of its arguments */
  constructor(
    home: string,
    manifest: string,
    flags: string[] = [],
    how: { program?: string; node?: string; wrapper?: string[] } = {},
  ) {
    const { program = SUPERVISOR, node = process.execPath, wrapper = [] } = how;
    this.paths = pathsOf(home, join(home, 'run'));
    const { NODE_EXTRA_CA_CERTS: _, ...env } = process.env;
    const given = ['--home', home, '--run-dir', this.paths.run, '--worker-manifest', manifest, ...flags];
    const [command = '', ...args] = [...wrapper, node, program, ...given];
    this.#child = spawn(
      command,
      args,
      // Only a test that says so has a pool.
      { stdio: ['ignore', 'ignore', 'pipe'], env: { ...env, VTPM_POOL_MAX: '0' } },
    );
    this.#child.stderr?.setEncoding('utf8').on('data', (text: string) => {
      this.#stderr += text;
    });
  }

  get pid(): number {
    return this.#child.pid ?? -1;
  }

  get stderr(): string {
    return this.#stderr;
  }

  get hasEnded(): boolean {
    return this.#child.exitCode !== null || this.#child.signalCode !== null;
  }

  /** Resolves when it serves; rejects with what it wrote where it ends instead. */
  async ready(): Promise<this> {
    while (!this.#stderr.includes('"msg":"ready"')) {
      if (this.#child.exitCode !== null) throw new Error(this.#stderr);
      await Promise.race([
        once(this.#child.stderr as NodeJS.ReadableStream, 'data'),
        once(this.#child, 'close'),
      ]);
    }
    return this;
  }

  /** @returns exit status, null where a signal ended it */
  async end(signal?: NodeJS.Signals): Promise<number | null> {
    if (signal) this.#child.kill(signal);
    if (this.#child.exitCode === null && this.#child.signalCode === null) await once(this.#child, 'close');
    return this.#child.exitCode;
  }

  call(method: string, path: string, body?: unknown): Promise<Answer> {
    return new Promise((resolve, reject) => {
      const call = request(
        { socketPath: this.paths.supervisor.socket, method, path, agent: false },
        async (response) => {
          let text = '';
          for await (const chunk of response) text += String(chunk);
          resolve({ status: response.statusCode ?? 0, body: JSON.parse(text) });
        },
      );
      call.on('error', reject);
      call.end(body === undefined ? undefined : typeof body === 'string' ? body : JSON.stringify(body));
    });
  }

  /** Registers a vTPM as vtpmctl does. */
  async create(name: string, change: Parameters<typeof newVtpm>[2] = {}): Promise<Answer> {
    const { delegateKey } = (await this.call('GET', '/health')).body;
    return await this.call('POST', '/vtpms', newVtpm(name, Buffer.from(delegateKey, 'hex'), change));
  }
}

/** @param given fields of the entry; `verbs` are those of its delegation */
export function newVtpm(
  name: string,
  delegateKey: Uint8Array,
  given: Record<string, unknown> & { readonly verbs?: Verb[] } = {},
): object {
  const { verbs = ['MANUFACTURE', 'COLD', 'RESUME'], ...change } = given;
  const id = randomUUID();
  const vmUuid = randomUUID();
  const content: Delegation = {
    format: 1,
    toolstackKey: toolstackKey.publicKey,
    delegateKey,
    vtpmUuid: uuidToBytes(id),
    vmUuid: uuidToBytes(vmUuid),
    verbs,
  };
  const { delegation, signature } = signDelegation(toolstackKey, content);
  return {
    id,
    name,
    vmUuid,
    isolation: 'sandbox',
    autostart: false,
    startup: 'clear',
    delegation: delegation.toString('base64'),
    delegationSignature: signature.toString('base64'),
    ...change,
  };
}

/** Every process that runs in the sandbox out of one of an installation's images. */
export function workersOf({ supervisor: { images } }: Paths): ProcessId[] {
  const roots = readdirSync(images).map((name) => identity(join(images, name, 'root')));
  return readdirSync('/proc')
    .map(Number)
    .filter((pid) => pid > 0 && roots.includes(identity(`/proc/${pid}/root/`)))
    .flatMap((pid) => processId(pid) ?? []);
}

function identity(path: string): string {
  try {
    const { dev, ino } = statSync(path);
    return `${dev}:${ino}`;
  } catch {
    return path;
  }
}

/** Connects to a door. */
export async function connectDoor(path: string): Promise<Socket> {
  const socket = createConnection(path);
  await once(socket, 'connect');
  return socket;
}

export async function exchange(socket: Socket, text: string): Promise<string> {
  socket.write(text);
  const [data] = (await once(socket, 'data')) as [Buffer];
  return data.toString();
}

/** Resolves when `condition` holds. */
export async function until(condition: () => boolean | Promise<boolean>): Promise<void> {
  while (!(await condition())) await new Promise((resolve) => setTimeout(resolve, 10));
}

export function removeDirectory(path: string): void {
  rmSync(path, { recursive: true, force: true });
}
