import { type ChildProcess, spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { existsSync, mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { type IncomingMessage, request } from 'node:http';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { type Paths, pathsOf } from 'vtpm-common';
import { reapAtExit } from './reap.js';
import { TestToolstack, WorkerClient } from './worker-client.js';

const PROGRAM = fileURLToPath(new URL('../../../manager/bin/vtpm-managerd.js', import.meta.url));

export interface StartOptions {
  /** Of the manager. */
  readonly args?: readonly string[];
  readonly nodeArgs?: readonly string[];
  /** A program with its arguments that runs it. */
  readonly under?: readonly string[];
}

export interface Answer {
  readonly status: number;
  readonly body: Record<string, unknown>;
}

/** One installation of vtpm-managerd in a directory of its own, as real processes. */
export class ManagerInstallation {
  readonly home = mkdtempSync(join(tmpdir(), 'vtpm-md-'));
  readonly paths: Paths['manager'] = pathsOf(this.home, join(this.home, 'run')).manager;
  readonly toolstack = new TestToolstack();
  child: ChildProcess | undefined;
  #stderr: () => string = () => '';

  /** What the service has logged since it was started. */
  get stderr(): string {
    return this.#stderr();
  }

  /** Runs a command to its end. */
  async run(...args: string[]): Promise<{ code: number | null; stdout: string; stderr: string }> {
    const child = this.#spawn(args);
    const stdout = collect(child.stdout);
    const stderr = collect(child.stderr);
    const [code] = (await once(child, 'close')) as [number | null];
    return { code, stdout: stdout(), stderr: stderr() };
  }

  /** The same under a Node with arguments of its own: one that kills itself, for instance. */
  async runWith(
    nodeArgs: readonly string[],
    ...args: string[]
  ): Promise<{ code: number | null; signal: NodeJS.Signals | null; stdout: string; stderr: string }> {
    const child = this.#spawn(args, { nodeArgs });
    const stdout = collect(child.stdout);
    const stderr = collect(child.stderr);
    const [code, signal] = (await once(child, 'close')) as [number | null, NodeJS.Signals | null];
    return { code, signal, stdout: stdout(), stderr: stderr() };
  }

  async init(tpm: string, ...more: string[]): Promise<Record<string, unknown>> {
    const key = this.toolstack.key.publicKey.toString('hex');
    const { code, stdout, stderr } = await this.run(
      ...['init', '--tpm', tpm, '--toolstack-key', key, '--json', ...more],
    );
    if (code !== 0) throw new Error(`init ended with ${code}: ${stderr}`);
    return JSON.parse(stdout) as Record<string, unknown>;
  }

  /** Starts the service. Resolves when it is ready or locked. @throws with what it wrote when it ends instead */
  async start(options: StartOptions = {}): Promise<Record<string, unknown>> {
    const child = this.#spawn(options.args ?? [], options);
    this.child = child;
    this.#stderr = collect(child.stderr);
    const closed = once(child, 'close');
    for (;;) {
      if (child.exitCode !== null || child.signalCode !== null) {
        await closed;
        throw new Error(`vtpm-managerd ended with ${child.exitCode ?? child.signalCode}: ${this.stderr}`);
      }
      if (/"status":"(ready|locked)"/.test(this.stderr)) return (await this.admin('GET', '/health')).body;
      await delay(10);
    }
  }

  /** @returns the exit code, null where it was killed by the signal */
  async stop(signal: NodeJS.Signals = 'SIGTERM'): Promise<number | null> {
    const { child } = this;
    if (!child || child.exitCode !== null || child.signalCode !== null) return child?.exitCode ?? null;
    const exited = once(child, 'exit');
    child.kill(signal);
    const [code] = (await exited) as [number | null];
    return code;
  }

  async admin(method: string, path: string, body?: object | string): Promise<Answer> {
    const call = request({ socketPath: this.paths.adminSocket, method, path });
    call.end(typeof body === 'object' ? JSON.stringify(body) : body);
    const [response] = (await once(call, 'response')) as [IncomingMessage];
    let text = '';
    for await (const chunk of response.setEncoding('utf8')) text += chunk;
    return { status: response.statusCode ?? 0, body: JSON.parse(text) as Record<string, unknown> };
  }

  worker(managerId: string): WorkerClient {
    return new WorkerClient(this.paths.workerSocket, Buffer.from(managerId, 'hex'));
  }

  async remove(): Promise<void> {
    // In order: it waits for its embedded TPM, which would go on writing into the directory otherwise.
    await this.stop();
    rmSync(this.home, { recursive: true, force: true, maxRetries: 20, retryDelay: 50 });
  }

  #spawn(args: readonly string[], { under = [], nodeArgs = [] }: StartOptions = {}): ChildProcess {
    const { NODE_EXTRA_CA_CERTS: _slow, ...env } = process.env;
    const [program = '', ...rest] = [
      ...[...under, process.execPath, ...nodeArgs, PROGRAM],
      ...[...args, '--home', this.home, '--run-dir', join(this.home, 'run')],
    ];
    return reapAtExit(
      spawn(program, rest, {
        env: { ...env, VTPM_LOG_FORMAT: 'json' },
        stdio: ['ignore', 'pipe', 'pipe'],
      }),
    );
  }
}

/** A swtpm that stands in for the chip: it outlives the manager, as a chip does. */
export class StandInTpm {
  readonly directory = mkdtempSync(join(tmpdir(), 'vtpm-swtpm-'));
  readonly socket = join(this.directory, 'tpm.sock');
  #child: ChildProcess | undefined;

  async start(): Promise<void> {
    const state = join(this.directory, 'state');
    mkdirSync(state, { recursive: true });
    rmSync(this.socket, { force: true });
    this.#child = spawn(
      'swtpm',
      [
        'socket',
        '--tpm2',
        '--tpmstate',
        `dir=${state}`,
        '--flags',
        'not-need-init',
        '--server',
        `type=unixio,path=${this.socket}`,
      ],
      { stdio: 'ignore' },
    );
    while (!existsSync(this.socket)) await delay(10);
  }

  /** TPM2_PCR_Extend of SHA-256 (TPM 2.0 part 3, section 22.2) with 32 random bytes: other software has booted. */
  async extendPcr(pcr: number): Promise<void> {
    const handle = Buffer.alloc(4);
    handle.writeUInt32BE(pcr);
    const command = Buffer.concat([
      Buffer.from('80020000004100000182', 'hex'),
      handle,
      Buffer.from('00000009400000090000000000', 'hex'),
      Buffer.from('00000001000b', 'hex'),
      randomBytes(32),
    ]);
    const socket = connect(this.socket);
    await once(socket, 'connect');
    socket.write(command);
    const [answer] = (await once(socket, 'data')) as [Buffer];
    socket.destroy();
    if (answer.readUInt32BE(6) !== 0) throw new Error(`PCR_Extend: ${answer.toString('hex')}`);
  }

  /** As a chip that does not answer; `start` again goes on with the same state. */
  async kill(): Promise<void> {
    if (this.#child && this.#child.exitCode === null && this.#child.signalCode === null) {
      const exited = once(this.#child, 'exit');
      this.#child.kill('SIGKILL');
      await exited;
    }
  }

  async stop(): Promise<void> {
    await this.kill();
    rmSync(this.directory, { recursive: true, force: true });
  }
}

function collect(stream: NodeJS.ReadableStream | null): () => string {
  let text = '';
  stream?.setEncoding('utf8').on('data', (chunk: string) => {
    text += chunk;
  });
  return () => text;
}
