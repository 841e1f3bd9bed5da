import { type IncomingMessage, request } from 'node:http';
import { isToolstackErrorCode, ToolstackError } from '../error.js';

/** What the supervisor needs of the manager's GET /health. */
export interface ManagerHealth {
  /** `ready`, `locked`, or why neither: another version may have more of them. */
  readonly status: string;
  /** NaCl box public key, 32 bytes in hex. */
  readonly managerId: string;
  readonly message?: string;
}

/** What the supervisor needs of the manager's GET /vtpms/ID. */
export interface ManagerRecord {
  readonly vmUuid: string;
  readonly kind: 'live' | 'retired';
  readonly epoch: number;
  readonly generation: number;
}

const TIMEOUT_MS = 10_000;
const MAX_ANSWER_BYTES = 1024 * 1024;

/** Calls of the manager's admin plane: HTTP and JSON on a unix socket. */
export class AdminClient {
  constructor(readonly socketPath: string) {}

  /** @throws ToolstackError `manager-unreachable` | `manager-refused` */
  async health(): Promise<ManagerHealth> {
    const value = (await this.#get('/health')) as Partial<ManagerHealth> | undefined;
    if (typeof value?.status !== 'string' || typeof (value.managerId ?? '') !== 'string') {
      throw new ToolstackError(
        'manager-refused',
        'the manager answers GET /health in a form this version does not know',
      );
    }
    return { ...value, managerId: value.managerId ?? '' } as ManagerHealth;
  }

  /** @returns undefined where the manager has no record of the vTPM */
  async vtpm(id: string): Promise<ManagerRecord | undefined> {
    const value = (await this.#get(`/vtpms/${id}`)) as Partial<ManagerRecord> | undefined;
    if (value === undefined) return undefined;
    const isCount = (count: unknown): boolean => Number.isSafeInteger(count) && Number(count) >= 0;
    const isKind = value.kind === 'live' || value.kind === 'retired';
    if (!isKind || typeof value.vmUuid !== 'string' || !isCount(value.epoch) || !isCount(value.generation)) {
      throw new ToolstackError(
        'manager-refused',
        `the manager describes vTPM ${id} in a form this version does not know`,
      );
    }
    return value as ManagerRecord;
  }

  /** Opens the event stream; the caller reads lines from it and closes it. */
  events(signal: AbortSignal): Promise<IncomingMessage> {
    return this.#open('/events', signal);
  }

  async #get(path: string): Promise<unknown> {
    const response = await this.#open(path, AbortSignal.timeout(TIMEOUT_MS));
    const chunks: Buffer[] = [];
    let size = 0;
    try {
      for await (const chunk of response as AsyncIterable<Buffer>) {
        size += chunk.length;
        if (size > MAX_ANSWER_BYTES) throw new Error('the answer is too long');
        chunks.push(chunk);
      }
    } catch (cause) {
      throw this.#unreachable(cause);
    }
    let value: unknown;
    try {
      value = JSON.parse(Buffer.concat(chunks).toString('utf8'));
    } catch (cause) {
      throw new ToolstackError('manager-refused', `the manager's answer to GET ${path} is not JSON`, {
        cause,
      });
    }
    if (response.statusCode === 200) return value;
    const { code, message } = (value as { error?: { code?: unknown; message?: unknown } })?.error ?? {};
    if (response.statusCode === 404 && code === 'unknown-vtpm') return undefined;
    const isLeaving = code === 'shutting-down';
    throw new ToolstackError(
      isLeaving ? 'manager-unreachable' : isToolstackErrorCode(code) ? code : 'manager-refused',
      `the manager refuses GET ${path}: ${String(message ?? `HTTP status ${response.statusCode}`)}`,
    );
  }

  #open(path: string, signal: AbortSignal): Promise<IncomingMessage> {
    return new Promise((resolve, reject) => {
      const call = request({ socketPath: this.socketPath, path, agent: false, signal }, resolve);
      call.on('error', (cause) => reject(this.#unreachable(cause)));
      call.end();
    });
  }

  #unreachable(cause: unknown): ToolstackError {
    return new ToolstackError(
      'manager-unreachable',
      `vtpm-managerd does not answer at ${this.socketPath} (${(cause as Error).message}); start it, then try again`,
      { cause },
    );
  }
}
