import { mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { createServer, type Server } from 'node:http';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { type Paths, pathsOf } from 'vtpm-common';
import { type Finished, REPOSITORY, run } from '../support/installation.js';

export interface Call {
  readonly method: string;
  readonly path: string;
  readonly body: unknown;
}

export interface Answer {
  status?: number;
  body?: unknown;
  /** Instead of a body: writes JSON lines until it resolves; where it rejects the connection is broken. */
  lines?(write: (line: object) => void): Promise<void>;
}

export type Reply = Answer | ((call: Call) => Answer);

/** An HTTP server on a daemon's socket with the answers a test gives it. Unknown calls are 404 `unknown-vtpm`. */
export class StubDaemon {
  readonly calls: Call[] = [];
  readonly #server: Server;

  private constructor(readonly replies: Record<string, Reply>) {
    this.#server = createServer((request, response) => {
      const chunks: Buffer[] = [];
      request.on('data', (chunk: Buffer) => chunks.push(chunk));
      request.on('end', () => {
        const text = Buffer.concat(chunks).toString();
        const call: Call = {
          method: request.method ?? '',
          path: request.url ?? '',
          body: text === '' ? undefined : JSON.parse(text),
        };
        this.calls.push(call);
        const given = this.replies[`${call.method} ${call.path}`];
        const reply = typeof given === 'function' ? given(call) : given;
        const unknown = {
          status: 404,
          body: { error: { code: 'unknown-vtpm', message: 'there is no such vTPM' } },
        };
        const { status = 200, body, lines }: Answer = reply ?? unknown;
        if (lines) {
          response.writeHead(status, { 'content-type': 'application/x-ndjson' });
          lines((line) => response.write(`${JSON.stringify(line)}\n`)).then(
            () => response.end(),
            () => response.destroy(),
          );
          return;
        }
        response.writeHead(status, { 'content-type': 'application/json' });
        response.end(body === undefined ? '' : JSON.stringify(body));
      });
    });
  }

  static async listen(path: string, replies: Record<string, Reply>): Promise<StubDaemon> {
    mkdirSync(dirname(path), { recursive: true });
    const daemon = new StubDaemon(replies);
    await new Promise<void>((resolve) => daemon.#server.listen(path, resolve));
    return daemon;
  }

  async close(): Promise<void> {
    await new Promise<void>((resolve) => {
      this.#server.close(() => resolve());
      this.#server.closeAllConnections();
    });
  }
}

/** A home directory, daemons that a test plays, and vtpmctl as its own process. */
export class Desk {
  readonly directory = mkdtempSync(join(tmpdir(), 'vtpm-ctl-'));
  readonly paths: Paths = pathsOf(join(this.directory, 'h'));
  readonly #daemons: StubDaemon[] = [];

  async manager(replies: Record<string, Reply>): Promise<StubDaemon> {
    return await this.#play(this.paths.manager.adminSocket, replies);
  }

  async supervisor(replies: Record<string, Reply>): Promise<StubDaemon> {
    return await this.#play(this.paths.supervisor.socket, replies);
  }

  ctl(args: readonly string[], env: NodeJS.ProcessEnv = {}): Promise<Finished> {
    return run(process.execPath, [vtpmctl, '--home', this.paths.home, ...args], env);
  }

  async clear(): Promise<void> {
    for (const daemon of this.#daemons) await daemon.close();
    rmSync(this.directory, { recursive: true, force: true });
  }

  async #play(path: string, replies: Record<string, Reply>): Promise<StubDaemon> {
    const daemon = await StubDaemon.listen(path, replies);
    this.#daemons.push(daemon);
    return daemon;
  }
}

export const vtpmctl = join(REPOSITORY, 'toolstack/bin/vtpmctl.js');

export function supervisorVtpm(id: string, name: string, extra: object = {}): Record<string, unknown> {
  return {
    id,
    name,
    vmUuid: '00000000-0000-4000-8000-00000000abcd',
    isolation: 'sandbox',
    autostart: false,
    startup: 'clear',
    state: 'stopped',
    reason: null,
    vmRunId: null,
    epoch: null,
    worker: null,
    sockets: { tpm: '/run/t.sock', tcti: '/run/c.sock', control: null, ring: null },
    ...extra,
  };
}

export function managerVtpm(id: string, extra: object = {}): Record<string, unknown> {
  return {
    id,
    vmUuid: '00000000-0000-4000-8000-00000000abcd',
    kind: 'live',
    generation: 7,
    epoch: 3,
    savedAt: '2026-01-02T03:04:05.678Z',
    createdAt: '2026-01-01T00:00:00.000Z',
    savedBytes: 9000,
    marks: [],
    libtpmsVersion: '0.9.2',
    session: null,
    erasure: null,
    ...extra,
  };
}
