import { type IncomingMessage, request } from 'node:http';
import type { MigrateMode } from 'vtpm-proto';
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
  readonly kind: 'live' | 'retired' | 'moved';
  readonly epoch: number;
  readonly generation: number;
  /** The volatile state is kept, too: a reference to it is out, or it was frozen. */
  readonly isSuspended?: boolean;
  /** It has left, and the destination has not said what became of it. */
  readonly migrating?: boolean;
}

/** What the supervisor needs of the manager's GET /migrations/ID. */
export interface ManagerMigration {
  /** `preparing`, `departing`, `in-doubt`, `committed` or `aborted`; another version may have more of them. */
  readonly state: string;
  readonly mode: string;
}

/** A vTPM that another host sends, as the manager tells of it. */
export interface Incoming {
  /** 32 hex digits. */
  readonly migration: string;
  readonly id: string;
  readonly vmUuid: string;
  readonly vmRunId: string;
  /** At the host that sends it. */
  readonly epoch: number;
  readonly mode: MigrateMode;
  readonly from: { readonly name: string; readonly hostId: string };
  /** See Description. */
  readonly description: string;
  readonly dryRun: boolean;
}

const TIMEOUT_MS = 10_000;
const MAX_ANSWER_BYTES = 1024 * 1024;
/** Of a refusal, in characters. */
const MAX_MESSAGE = 300;

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
    const isKind = value.kind === 'live' || value.kind === 'retired' || value.kind === 'moved';
    if (!isKind || typeof value.vmUuid !== 'string' || !isCount(value.epoch) || !isCount(value.generation)) {
      throw new ToolstackError(
        'manager-refused',
        `the manager describes vTPM ${id} in a form this version does not know`,
      );
    }
    return value as ManagerRecord;
  }

  /** @param id 32 hex digits @returns undefined where the manager knows nothing of it, or not any more */
  async migration(id: string): Promise<ManagerMigration | undefined> {
    const value = (await this.#get(`/migrations/${id}`)) as { state?: unknown; mode?: unknown } | undefined;
    return value && { state: String(value.state), mode: String(value.mode) };
  }

  /** Those that wait for an answer. */
  async incoming(): Promise<Incoming[]> {
    const value = (await this.#get('/migrations')) as { migrations?: readonly { incoming?: Incoming }[] };
    return (value.migrations ?? []).flatMap(({ incoming }) => incoming ?? []);
  }

  /** @throws ToolstackError `unknown-migration` where nobody waits for that any more, … */
  async acceptMigration(id: string): Promise<void> {
    await this.#call('POST', `/migrations/${id}/accept`, {});
  }

  /** @throws as `acceptMigration` */
  async refuseMigration(id: string, { code, message }: ToolstackError): Promise<void> {
    await this.#call('POST', `/migrations/${id}/refuse`, { code, message: message.slice(0, MAX_MESSAGE) });
  }

  /** Asks the destination what it decided, now. @throws as `acceptMigration` */
  async resolveMigration(id: string): Promise<void> {
    await this.#call('POST', `/migrations/${id}/resolve`, {});
  }

  /** @param hostId hex @returns undefined where it is no peer */
  async peerName(hostId: string): Promise<string | undefined> {
    const value = (await this.#get('/peers')) as { peers?: readonly { name: string; hostId: string }[] };
    return value.peers?.find((peer) => peer.hostId === hostId)?.name;
  }

  /** @param digest of a worker's image, in hex */
  async isImageAllowed(digest: string): Promise<boolean> {
    const value = (await this.#get('/images')) as { images?: readonly { digest: string }[] };
    return value.images?.some((image) => image.digest === digest) === true;
  }

  /** Opens the stream of the events of these types; the caller reads lines from it and closes it. */
  events(types: readonly string[], signal: AbortSignal): Promise<IncomingMessage> {
    return this.#open('GET', `/events?types=${types.join(',')}`, signal);
  }

  /** @returns undefined where the manager does not know what is asked for */
  async #get(path: string): Promise<unknown> {
    try {
      return await this.#call('GET', path);
    } catch (error) {
      const { code } = ToolstackError.from(error);
      if (code === 'unknown-vtpm' || code === 'unknown-migration') return undefined;
      throw error;
    }
  }

  async #call(method: 'GET' | 'POST', path: string, body?: object): Promise<unknown> {
    const response = await this.#open(method, path, AbortSignal.timeout(TIMEOUT_MS), body);
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
      throw new ToolstackError('manager-refused', `the manager's answer to ${method} ${path} is not JSON`, {
        cause,
      });
    }
    if (response.statusCode === 200) return value;
    const { code, message } = (value as { error?: { code?: unknown; message?: unknown } })?.error ?? {};
    const isLeaving = code === 'shutting-down';
    throw new ToolstackError(
      isLeaving ? 'manager-unreachable' : isToolstackErrorCode(code) ? code : 'manager-refused',
      `the manager refuses ${method} ${path}: ${String(message ?? `HTTP status ${response.statusCode}`)}`,
    );
  }

  #open(method: string, path: string, signal: AbortSignal, body?: object): Promise<IncomingMessage> {
    return new Promise((resolve, reject) => {
      const content = body === undefined ? undefined : Buffer.from(JSON.stringify(body));
      const headers = content && { 'content-type': 'application/json', 'content-length': content.length };
      const options = { socketPath: this.socketPath, method, path, agent: false, signal };
      const call = request({ ...options, ...(headers && { headers }) }, resolve);
      call.on('error', (cause) => reject(this.#unreachable(cause)));
      call.end(content);
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
