import { DaemonClient } from './http.js';
import type { MigrateProgress } from './migration/progress.js';

/** Starting waits for a worker, a Load and the first durable save; stopping for the last one. */
const LIFECYCLE_TIMEOUT_MS = 120_000;
/** 100 MB are copied and hashed. */
const IMAGE_TIMEOUT_MS = 60_000;

/** Waits for what is under way, for the next program to be tried, and for the next program. */
const UPGRADE_TIMEOUT_MS = 240_000;

export interface SupervisorHealth {
  readonly status: string;
  readonly version: string;
  readonly delegateKey: string;
  readonly managerConnected: boolean;
  readonly imageDigest: string;
  readonly vtpms: number;
  /** How often the process has become another program. */
  readonly upgrades: number;
}

/** Of the worker, as it was measured. */
export interface SupervisorImage {
  readonly digest: string;
  readonly parts: readonly { readonly name: string; readonly sha256: string; readonly bytes: number }[];
  readonly argv: readonly string[];
  readonly env: Readonly<Record<string, string>>;
}

/** What `create` settles. */
interface VtpmSettings {
  readonly id: string;
  readonly name: string;
  readonly vmUuid: string;
  readonly isolation: string;
  readonly autostart: boolean;
  readonly startup: string;
  /** Absent: tpm and tcti. */
  readonly doors?: readonly string[];
  /** Absent: reference. */
  readonly stateBlobs?: string;
  /** `uid:gid` in numbers; absent or null: the supervisor's user. */
  readonly socketOwner?: string | null;
  readonly socketMode?: string;
  /** Where its token is and whose, where swtpm starts it. */
  readonly dropin?: { readonly place: string; readonly uid: number } | null;
}

export interface VmmStatus {
  readonly connected: boolean;
  readonly power: 'on' | 'off';
  /** Bytes. */
  readonly bufferSize: number;
  readonly locality: number;
}

export interface SupervisorVtpm extends VtpmSettings {
  readonly state:
    | 'stopped'
    | 'starting'
    | 'running'
    | 'restarting'
    | 'lost'
    | 'stopping'
    | 'crashed'
    | 'migrating'
    | 'arriving'
    | 'moved';
  readonly reason?: string | null;
  /** Of one that has moved, as this host knows the other one, and since when, ISO 8601. */
  readonly movedTo?: string | null;
  readonly movedAt?: string | null;
  readonly vmRunId: string | null;
  readonly epoch: number | null;
  readonly worker: {
    readonly pid: number;
    readonly isolation: string;
    readonly profile: string;
    readonly layers: readonly string[];
    readonly waived: readonly string[];
    readonly startedAt?: string;
  } | null;
  /** What its VMM does, where that powers the TPM. */
  readonly vmm?: VmmStatus | null;
  readonly sockets: {
    readonly tpm: string | null;
    readonly tcti: string | null;
    readonly control: string | null;
    readonly mssim?: number | null;
    readonly ring: string | null;
  };
  /** What another supervisor makes its entry from, JSON: it goes into a migrate order as it is. */
  readonly description?: string;
}

export interface DropinBinding {
  readonly secretSha256: string;
  readonly uid: number;
  readonly place: string;
}

export interface VtpmChange {
  readonly doors?: readonly string[];
  readonly startup?: string;
  readonly dropin?: DropinBinding | null;
}

export interface NewVtpm extends VtpmSettings {
  /** base64 */
  readonly delegation: string;
  /** base64 */
  readonly delegationSignature: string;
  readonly dropin?: DropinBinding;
  /** That it comes with. */
  readonly migration?: object;
}

/** The supervisor's API. Errors as in DaemonClient. */
export class SupervisorApi {
  readonly #client: DaemonClient;
  constructor(socketPath: string) {
    this.#client = new DaemonClient('supervisor', socketPath);
  }

  async health(timeout?: number): Promise<SupervisorHealth> {
    return await this.#client.call('GET', '/health', timeout === undefined ? {} : { timeout });
  }

  /** Answered by the next program. */
  async upgrade(): Promise<SupervisorHealth> {
    return await this.#client.call('POST', '/upgrade', { timeout: UPGRADE_TIMEOUT_MS });
  }

  async image(): Promise<SupervisorImage> {
    return await this.#client.call('GET', '/image');
  }

  /** Starts workers from what is installed now, if that is `digest`. */
  async refreshImage(digest: string): Promise<void> {
    await this.#client.call('PUT', '/image', { body: { digest }, timeout: IMAGE_TIMEOUT_MS });
  }

  async create(vtpm: NewVtpm): Promise<SupervisorVtpm> {
    return await this.#client.call('POST', '/vtpms', { body: vtpm });
  }

  async vtpms(): Promise<SupervisorVtpm[]> {
    return (await this.#client.call<{ vtpms: SupervisorVtpm[] }>('GET', '/vtpms')).vtpms;
  }

  async vtpm(nameOrId: string): Promise<SupervisorVtpm> {
    return await this.#client.call('GET', `/vtpms/${encodeURIComponent(nameOrId)}`);
  }

  /** While it is stopped. */
  async change(nameOrId: string, change: VtpmChange): Promise<SupervisorVtpm> {
    return await this.#client.call('PATCH', `/vtpms/${encodeURIComponent(nameOrId)}`, { body: change });
  }

  async start(nameOrId: string): Promise<SupervisorVtpm> {
    return await this.#lifecycle(nameOrId, 'start');
  }

  async stop(nameOrId: string): Promise<SupervisorVtpm> {
    return await this.#lifecycle(nameOrId, 'stop');
  }

  async forget(nameOrId: string): Promise<void> {
    await this.#client.call('DELETE', `/vtpms/${encodeURIComponent(nameOrId)}`);
  }

  /** @param order a serialised SignedMigrateOrder @param take gets what comes of it, until it is settled */
  async migrate(
    nameOrId: string,
    order: Uint8Array,
    signal: AbortSignal,
    take: (progress: MigrateProgress) => void,
  ): Promise<void> {
    const body = { order: Buffer.from(order).toString('base64') };
    await this.#client.lines(`/vtpms/${encodeURIComponent(nameOrId)}/migrate`, body, signal, take);
  }

  /** @returns false where its state is on its way already */
  async cancelMigration(nameOrId: string): Promise<boolean> {
    const path = `/vtpms/${encodeURIComponent(nameOrId)}/migrate`;
    return (await this.#client.call<{ cancelled: boolean }>('DELETE', path)).cancelled;
  }

  async #lifecycle(nameOrId: string, verb: 'start' | 'stop'): Promise<SupervisorVtpm> {
    return await this.#client.call('POST', `/vtpms/${encodeURIComponent(nameOrId)}/${verb}`, {
      timeout: LIFECYCLE_TIMEOUT_MS,
    });
  }
}
