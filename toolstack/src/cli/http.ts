import { type IncomingMessage, request } from 'node:http';
import { isToolstackErrorCode, ToolstackError } from '../error.js';
import { nextStep } from './next-step.js';

const DEFAULT_TIMEOUT_MS = 10_000;
const MAX_ANSWER_BYTES = 16 * 1024 * 1024;

export type Daemon = 'manager' | 'supervisor';

export interface RequestOptions {
  readonly body?: unknown;
  /** Milliseconds for the whole answer; 10,000 unless given. */
  readonly timeout?: number;
  /** Instead of a time. */
  readonly signal?: AbortSignal;
}

/** Of one object of JSON lines. */
const MAX_LINE_BYTES = 1024 * 1024;

/**
 * JSON over HTTP on a daemon's unix socket. Every failure is a ToolstackError: `not-running` where nobody listens,
 * `manager-unreachable` or `busy` where the daemon does not answer in time, and what the daemon itself says otherwise.
 */
export class DaemonClient {
  constructor(
    readonly daemon: Daemon,
    readonly socketPath: string,
  ) {}

  async call<T>(
    method: 'GET' | 'POST' | 'PUT' | 'PATCH' | 'DELETE',
    path: string,
    options: RequestOptions = {},
  ): Promise<T> {
    const { status, value: text } = await this.#send(method, path, options, readAll);
    const answer = this.#parse(path, text);
    if (status >= 200 && status < 300) return answer as T;
    throw this.#refusal(path, status, answer);
  }

  /**
   * Hands on an answer that has no bound, as it comes. A connection that breaks is an error: what was handed on is then a
   * part.
   */
  async stream(path: string, timeout: number, take: (chunk: Buffer) => Promise<void> | void): Promise<void> {
    const { status, value } = await this.#send('GET', path, { timeout }, async (response) => {
      if (response.statusCode !== 200) return await readAll(response);
      for await (const chunk of response) await take(chunk as Buffer);
      return '';
    });
    if (status !== 200) throw this.#refusal(path, status, this.#parse(path, value));
  }

  /**
   * POSTs, and hands on an answer of JSON lines, one object after the other. No time limits it: it is as long as what it tells
   * about. A connection that breaks is an error.
   */
  async lines<T>(path: string, body: unknown, signal: AbortSignal, take: (line: T) => void): Promise<void> {
    const { status, value } = await this.#send('POST', path, { body, signal }, async (response) => {
      if (response.statusCode !== 200) return await readAll(response);
      let rest = '';
      for await (const chunk of response.setEncoding('utf8')) {
        const lines = (rest + chunk).split('\n');
        rest = lines.pop() ?? '';
        for (const line of lines) if (line !== '') take(this.#parse(path, line) as T);
        if (rest.length > MAX_LINE_BYTES) throw new ToolstackError('internal', 'the answer is too long');
      }
      return '';
    });
    if (status !== 200) throw this.#refusal(path, status, this.#parse(path, value));
  }

  #parse(path: string, text: string): unknown {
    try {
      return text === '' ? undefined : JSON.parse(text);
    } catch (cause) {
      throw new ToolstackError(
        'internal',
        `the ${this.daemon} answered ${path} with something else than JSON`,
        { cause },
      );
    }
  }

  #send<T>(
    method: string,
    path: string,
    { body, timeout = DEFAULT_TIMEOUT_MS, signal = AbortSignal.timeout(timeout) }: RequestOptions,
    read: (response: IncomingMessage) => Promise<T>,
  ): Promise<{ status: number; value: T }> {
    const payload = body === undefined ? undefined : Buffer.from(JSON.stringify(body));
    return new Promise((resolve, reject) => {
      const call = request({
        socketPath: this.socketPath,
        method,
        path,
        agent: false,
        signal,
        headers: payload ? { 'content-type': 'application/json', 'content-length': payload.length } : {},
      });
      const fail = (cause: unknown) => reject(this.#unreachable(cause, timeout));
      call.once('error', fail);
      call.once('response', (response) => {
        read(response).then((value) => resolve({ status: response.statusCode ?? 0, value }), fail);
      });
      call.end(payload);
    });
  }

  #unreachable(cause: unknown, timeout: number): ToolstackError {
    if (cause instanceof ToolstackError) return cause;
    const { code, name } = cause as NodeJS.ErrnoException;
    if (code === 'ENOENT' || code === 'ECONNREFUSED') {
      return new ToolstackError('not-running', `the ${this.daemon} is not running; start it: vtpmctl up`, {
        cause,
      });
    }
    const unreachable = this.daemon === 'manager' ? 'manager-unreachable' : 'not-running';
    if (code === 'EACCES' || code === 'EPERM') {
      return new ToolstackError(
        unreachable,
        `${this.socketPath} may not be opened by this user; run vtpmctl as the user that runs the ${this.daemon}`,
        { cause },
      );
    }
    const isLate = name === 'TimeoutError' || name === 'AbortError';
    return new ToolstackError(
      unreachable,
      isLate
        ? `the ${this.daemon} did not answer within ${timeout / 1000} s; see what it does: vtpmctl logs`
        : `the ${this.daemon} broke the connection (${(cause as Error).message}); see why: vtpmctl logs`,
      { cause },
    );
  }

  #refusal(path: string, status: number, answer: unknown): ToolstackError {
    const { code, message } =
      (answer as { error?: { code?: unknown; message?: unknown } } | undefined)?.error ?? {};
    if (typeof code !== 'string' || typeof message !== 'string') {
      return new ToolstackError(
        'internal',
        `the ${this.daemon} answered ${path} with status ${status} and no reason`,
      );
    }
    const own = isToolstackErrorCode(code)
      ? code
      : code === 'platform-policy'
        ? 'locked'
        : this.daemon === 'manager'
          ? 'manager-refused'
          : 'internal';
    const said = own === code ? message : `${message} (${code})`;
    return new ToolstackError(own, nextStep(own, said, vtpmOf(path)));
  }
}

/** The vTPM that a call is about, as its caller named it. */
function vtpmOf(path: string): string | undefined {
  const name = /^\/vtpms\/([^/?]+)/.exec(path)?.[1];
  return name === undefined ? undefined : decodeURIComponent(name);
}

async function readAll(response: IncomingMessage): Promise<string> {
  const chunks: Buffer[] = [];
  let length = 0;
  for await (const chunk of response) {
    length += (chunk as Buffer).length;
    if (length > MAX_ANSWER_BYTES) throw new ToolstackError('internal', 'the answer is too long');
    chunks.push(chunk as Buffer);
  }
  return Buffer.concat(chunks).toString('utf8');
}
