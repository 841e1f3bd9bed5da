import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { createWriteStream, existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { request } from 'node:http';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { type Paths, pathsOf } from 'vtpm-common';
import { reapAtExit } from './reap.js';
import { SmallDisk } from './small-disk.js';
import { type Swtpm, startSwtpm } from './swtpm.js';
import { until } from './until.js';

export const REPOSITORY = fileURLToPath(new URL('../../..', import.meta.url));

/** What the programs under test see: nothing of the developer's own settings. */
export function cleanEnvironment(extra: NodeJS.ProcessEnv = {}): NodeJS.ProcessEnv {
  return {
    PATH: process.env.PATH ?? '/usr/bin:/bin:/usr/sbin:/sbin',
    HOME: process.env.HOME ?? '/root',
    // A test that is about the pool says so; the others do not wait for workers that nobody uses.
    VTPM_POOL_MAX: '0',
    ...extra,
  };
}

export interface Finished {
  readonly code: number | null;
  readonly stdout: string;
  readonly stderr: string;
}

export interface Answer {
  readonly status: number;
  readonly body: Record<string, unknown>;
}

/**
 * A whole installation in a directory of its own: the real daemons as child processes of the test, and a swtpm that
 * stands in for the chip, on a directory outside the installation's home.
 */
export class Installation {
  readonly paths: Paths;
  manager: ChildProcess | undefined;
  supervisor: ChildProcess | undefined;

  private constructor(
    readonly directory: string,
    readonly home: string,
    readonly tpm: Swtpm | undefined,
    /** Under the home, where the test asked for one. */
    readonly disk: SmallDisk | undefined,
    /** A program with its arguments that runs each of the commands. */
    private readonly under: readonly string[] = [],
  ) {
    this.paths = pathsOf(home);
  }

  /** Initialised, and allowed to run the worker image of this build; no daemon runs yet. */
  static async create(
    options: {
      tpm?: 'swtpm' | 'embedded';
      initArgs?: string[];
      homeDisk?: string;
      under?: readonly string[];
    } = {},
  ): Promise<Installation> {
    const directory = mkdtempSync(join(tmpdir(), 'vtpm-'));
    const home = join(directory, 'h');
    const tpm = options.tpm === 'embedded' ? undefined : await startSwtpm();
    const disk = options.homeDisk ? SmallDisk.mount(home, options.homeDisk) : undefined;
    const installation = new Installation(directory, home, tpm, disk, options.under);
    const tpmArgs = tpm ? ['--tpm', `unix:${tpm.socket}`] : ['--tpm', 'embedded', '--yes-embedded'];
    const init = await installation.ctl('init', ...tpmArgs, ...(options.initArgs ?? []));
    if (init.code !== 0) {
      await installation.destroy();
      throw new Error(`init failed (${init.code}): ${init.stderr}`);
    }
    return installation;
  }

  /** On a home that is there already, `h` in that directory; its TPM is the embedded one. */
  static of(directory: string): Installation {
    return new Installation(directory, join(directory, 'h'), undefined, undefined);
  }

  /** Runs vtpmctl on this installation and waits for its end. */
  ctl(...args: string[]): Promise<Finished> {
    const [program = '', ...rest] = [...this.under, process.execPath];
    return run(program, [
      ...rest,
      join(REPOSITORY, 'toolstack/bin/vtpmctl.js'),
      '--home',
      this.home,
      ...args,
    ]);
  }

  /** @throws Error with both streams where vtpmctl does not end with 0 */
  async ctlJson(...args: string[]): Promise<Record<string, unknown>> {
    const { code, stdout, stderr } = await this.ctl('--json', ...args);
    if (code !== 0) throw new Error(`vtpmctl ${args.join(' ')} ended with ${code}: ${stderr}${stdout}`);
    return JSON.parse(stdout) as Record<string, unknown>;
  }

  /** Starts the manager and waits until it answers. @returns its /health */
  async startManager(
    options: { args?: string[]; nodeArgs?: string[]; env?: NodeJS.ProcessEnv } = {},
  ): Promise<Answer> {
    this.manager = this.#daemon('manager', 'manager/bin/vtpm-managerd.js', options);
    return this.#healthy(this.manager, 'manager', () => this.admin('GET', '/health'));
  }

  /** Starts the supervisor, waits until it answers, and allows the image it runs. */
  async startSupervisor(
    options: { args?: string[]; nodeArgs?: string[]; env?: NodeJS.ProcessEnv } = {},
  ): Promise<Answer> {
    this.supervisor = this.#daemon('supervisor', 'toolstack/bin/vtpm-supervisord.js', options);
    const health = await this.#healthy(this.supervisor, 'supervisor', () =>
      this.supervisord('GET', '/health'),
    );
    const image = await this.supervisord('GET', '/image');
    await this.admin('POST', '/images', { digest: image.body.digest, note: 'test' });
    return health;
  }

  async start(): Promise<void> {
    await this.startManager();
    await this.startSupervisor();
  }

  admin(method: string, path: string, body?: unknown): Promise<Answer> {
    return call(this.paths.manager.adminSocket, method, path, body);
  }

  supervisord(method: string, path: string, body?: unknown): Promise<Answer> {
    return call(this.paths.supervisor.socket, method, path, body);
  }

  /** Creates and starts a vTPM. @returns the path of its raw door */
  async vtpm(name: string, ...createArgs: string[]): Promise<string> {
    await this.ctlJson('create', name, ...createArgs);
    await this.ctlJson('start', name);
    return this.door(name);
  }

  door(name: string, kind: 'tpm' | 'tcti' | 'ring' = 'tpm'): string {
    return join(this.paths.supervisor.doors, name, `${kind}.sock`);
  }

  /** Of the one that is there, or of the next where one follows the other just now. */
  async workerPid(name: string): Promise<number> {
    return await until(`a worker of ${name}`, async () => {
      const { body } = await this.supervisord('GET', `/vtpms/${name}`);
      return (body.worker as { pid: number } | null | undefined)?.pid;
    });
  }

  async killManager(): Promise<void> {
    await end(this.manager, 'SIGKILL');
  }

  async killSupervisor(): Promise<void> {
    await end(this.supervisor, 'SIGKILL');
  }

  /** Everything the daemons logged so far. */
  logs(): string {
    return ['manager', 'supervisor']
      .map((name) => join(this.directory, `${name}.log`))
      .filter(existsSync)
      .map((path) => readFileSync(path, 'utf8'))
      .join('');
  }

  /** Both in order, as an operator does. */
  async stopDaemons(): Promise<void> {
    await end(this.supervisor, 'SIGTERM');
    await end(this.manager, 'SIGTERM');
  }

  async destroy(): Promise<void> {
    await this.stopDaemons();
    await this.tpm?.stop();
    this.disk?.unmount();
    rmSync(this.directory, { recursive: true, force: true });
  }

  #daemon(
    name: string,
    script: string,
    options: { nodeArgs?: string[]; args?: string[]; env?: NodeJS.ProcessEnv },
  ): ChildProcess {
    const log = createWriteStream(join(this.directory, `${name}.log`), { flags: 'a' });
    const [program = '', ...args] = [
      ...[...this.under, process.execPath],
      ...(options.nodeArgs ?? []),
      join(REPOSITORY, script),
      '--home',
      this.home,
      '--log-format',
      'json',
    ];
    const child = reapAtExit(
      spawn(program, [...args, ...(options.args ?? [])], {
        env: cleanEnvironment(options.env),
        stdio: ['ignore', 'pipe', 'pipe'],
      }),
    );
    child.stdout?.pipe(log, { end: false });
    child.stderr?.pipe(log, { end: false });
    return child;
  }

  async #healthy(child: ChildProcess, name: string, probe: () => Promise<Answer>): Promise<Answer> {
    return until(`the ${name} answers`, async () => {
      if (child.exitCode !== null || child.signalCode !== null) {
        throw new Error(`the ${name} ended with ${child.exitCode ?? child.signalCode}:\n${this.logs()}`);
      }
      const health = await probe().catch(() => undefined);
      return health?.body.status === 'starting' ? undefined : health;
    });
  }
}

/** Runs a program to its end. */
export async function run(
  program: string,
  args: string[],
  env: NodeJS.ProcessEnv = {},
  input?: Uint8Array,
): Promise<Finished> {
  const child = spawn(program, args, {
    cwd: REPOSITORY,
    env: cleanEnvironment(env),
    stdio: ['pipe', 'pipe', 'pipe'],
  });
  let stdout = '';
  let stderr = '';
  child.stdout.on('data', (chunk: Buffer) => {
    stdout += chunk.toString();
  });
  child.stderr.on('data', (chunk: Buffer) => {
    stderr += chunk.toString();
  });
  child.stdin.on('error', () => {});
  child.stdin.end(input);
  const [code] = (await once(child, 'close')) as [number | null];
  return { code, stdout, stderr };
}

/** Signals a child and waits for its end. */
export async function end(child: ChildProcess | undefined, signal: NodeJS.Signals): Promise<void> {
  if (!child || child.exitCode !== null || child.signalCode !== null) return;
  const gone = once(child, 'exit');
  child.kill(signal);
  await gone;
}

function call(socketPath: string, method: string, path: string, body?: unknown): Promise<Answer> {
  return new Promise((resolve, reject) => {
    const text = body === undefined ? undefined : JSON.stringify(body);
    const headers =
      text === undefined
        ? {}
        : { 'content-type': 'application/json', 'content-length': Buffer.byteLength(text) };
    // A connection of its own: one that was kept may have been closed while this process did something else.
    const options = { socketPath, method, path, headers, timeout: 60_000, agent: false };
    const sent = request(options, (response) => {
      const chunks: Buffer[] = [];
      response.on('data', (chunk: Buffer) => chunks.push(chunk));
      response.on('error', reject);
      response.on('end', () => {
        const answer = Buffer.concat(chunks).toString();
        resolve({
          status: response.statusCode ?? 0,
          body: answer ? (JSON.parse(answer) as Record<string, unknown>) : {},
        });
      });
    });
    sent.on('timeout', () => sent.destroy(new Error(`${method} ${path} was not answered within 60 s`)));
    sent.on('error', reject);
    sent.end(text);
  });
}
