import { DaemonClient } from './http.js';
import { PeerApi } from './peer-api.js';
import { PlatformApi } from './platform-api.js';

export interface ManagerHealth {
  readonly status: 'ready' | 'locked' | 'starting';
  readonly reason?: string;
  readonly message?: string;
  readonly version: string;
  readonly managerId: string;
  readonly storeId: string;
  readonly tpm: {
    readonly kind: string;
    readonly path: string;
    readonly manufacturer?: string;
    readonly hardwareProtected?: boolean;
  };
  readonly pcrSelection: string;
}

/** A vTPM as the manager knows it: the truth about saved state. */
export interface ManagerVtpm {
  readonly id: string;
  readonly vmUuid: string;
  readonly kind: 'live' | 'retired' | 'moved';
  /** Of a moved one: the peer's name, or its host id. */
  readonly movedTo?: string | null;
  /** Its state is on its way, or nobody knows yet whether it arrived. */
  readonly migrating?: boolean;
  readonly generation: number;
  readonly epoch: number;
  readonly savedAt: string | null;
  readonly createdAt: string | null;
  readonly savedBytes: number;
  readonly marks: readonly string[];
  readonly isSuspended?: boolean;
  readonly libtpmsVersion: string;
  readonly session: {
    readonly connected: boolean;
    readonly imageDigest: string;
    readonly isolation: string;
  } | null;
  /** Of a retired one. */
  readonly erasure: Erasure | null;
}

/** Whether the state of a retired vTPM is unreadable on old disks too. Times are ISO 8601, UTC. */
export interface Erasure {
  readonly isDone: boolean;
  readonly retiredAt: string | null;
  /** Of the rotation of the root key that does it; null: when somebody asks for one. */
  readonly due: string | null;
}

/** A migration that is not settled, or was decided since the manager started. */
export interface Migration {
  /** 32 hex digits. */
  readonly migration: string;
  /** Of the vTPM. */
  readonly id: string;
  readonly role: 'source' | 'destination';
  /** null: a manager before this one knew it; so with the times. */
  readonly mode: string | null;
  /** Name of the other host, or its host id. */
  readonly peer: string;
  readonly state: 'preparing' | 'departing' | 'in-doubt' | 'committed' | 'aborted';
  /** ISO 8601, UTC. */
  readonly begunAt: string | null;
  /** Of its step while it is under way, otherwise of its state. */
  readonly since: string | null;
  /** Of the source's toolstack, or of another host that gives itself out for it. */
  readonly description?: string;
  readonly reason?: string | null;
  readonly message?: string | null;
}

/** What came of one in doubt. */
export interface Resolved {
  readonly verdict: 'COMMIT' | 'ABORT';
  /** Without the word of the destination. */
  readonly takenBack: boolean;
}

export interface AllowedImage {
  readonly digest: string;
  readonly note: string;
  readonly allowedAt: string | null;
}

/** An entry of the audit log. */
export interface AuditEntry {
  readonly n: number;
  /** ISO 8601, UTC. */
  readonly time: string;
  readonly actor:
    | 'manager'
    | { readonly uid: number }
    | { readonly worker: string }
    | { readonly toolstackKey: string };
  readonly action: string;
  readonly verdict: string;
  readonly vtpm?: string;
  readonly epoch?: number;
  readonly generation?: number;
  readonly reason?: { readonly code: string; readonly message: string };
  readonly facts?: Readonly<Record<string, string>>;
}

/** What a verification of the audit log found; `vtpm-managerd audit-verify` says the same. */
export interface AuditVerdict {
  readonly checked: 'anchor' | 'chain';
  readonly because?: string;
  readonly isWhole: boolean;
  readonly first: number;
  readonly last: number;
  readonly digest: string;
  readonly authenticated: number;
  readonly unanchored: number;
  readonly torn?: { readonly path: string; readonly offset: number };
  readonly flaw?: { readonly entry: number; readonly path: string; readonly what: string };
}

/** A log may be of any length, and is read as a whole. */
const AUDIT_TIMEOUT_MS = 600_000;

/** Connects to another host, and waits for its answer. */
const RESOLVE_TIMEOUT_MS = 60_000;

/** The manager's admin plane. Errors as in DaemonClient. */
export class ManagerApi {
  readonly platform: PlatformApi;
  readonly peer: PeerApi;
  readonly #client: DaemonClient;
  constructor(socketPath: string) {
    this.#client = new DaemonClient('manager', socketPath);
    this.platform = new PlatformApi(this.#client);
    this.peer = new PeerApi(this.#client);
  }

  async health(timeout?: number): Promise<ManagerHealth> {
    return await this.#client.call('GET', '/health', timeout === undefined ? {} : { timeout });
  }

  /** All of them, page by page. */
  async vtpms(): Promise<ManagerVtpm[]> {
    const all: ManagerVtpm[] = [];
    let after: string | undefined;
    do {
      const query = after === undefined ? '' : `&after=${encodeURIComponent(after)}`;
      const page = await this.#client.call<{ vtpms: ManagerVtpm[]; next?: string | null }>(
        'GET',
        `/vtpms?limit=200${query}`,
      );
      all.push(...page.vtpms);
      // A page that does not move on would be asked for without end.
      after = page.next === after ? undefined : (page.next ?? undefined);
    } while (after !== undefined);
    return all;
  }

  async vtpm(id: string): Promise<ManagerVtpm> {
    return await this.#client.call('GET', `/vtpms/${encodeURIComponent(id)}`);
  }

  async retire(id: string): Promise<void> {
    await this.#client.call('POST', `/vtpms/${encodeURIComponent(id)}/retire`);
  }

  async migrations(): Promise<Migration[]> {
    return (await this.#client.call<{ migrations: Migration[] }>('GET', '/migrations')).migrations;
  }

  /**
   * Asks the destination now.
   * @param fencing that it is gone for good: without its answer the vTPM goes on here
   * @throws ToolstackError `in-doubt` where it does not say, `not-fenced`
   */
  async resolve(migration: string, fencing?: string): Promise<Resolved> {
    const path = `/migrations/${migration}/resolve`;
    const body = fencing === undefined ? {} : { fencing };
    return await this.#client.call('POST', path, { body, timeout: RESOLVE_TIMEOUT_MS });
  }

  async images(): Promise<AllowedImage[]> {
    return (await this.#client.call<{ images: AllowedImage[] }>('GET', '/images')).images;
  }

  async allowImage(digest: string, note: string | undefined): Promise<void> {
    await this.#client.call('POST', '/images', { body: { digest, note } });
  }

  async removeImage(digest: string): Promise<void> {
    await this.#client.call('DELETE', `/images/${encodeURIComponent(digest)}`);
  }

  /** The newest ones, oldest first. */
  async auditTail(count: number): Promise<AuditEntry[]> {
    return (await this.#client.call<{ entries: AuditEntry[] }>('GET', `/audit?tail=${count}`)).entries;
  }

  async auditVerify(): Promise<AuditVerdict> {
    return await this.#client.call('GET', '/audit/verify', { timeout: AUDIT_TIMEOUT_MS });
  }

  /** @param query `from` and `to` @param take gets the log's lines as bytes; all of them came where nothing is thrown */
  async auditExport(
    query: Readonly<Record<string, string>>,
    take: (chunk: Buffer) => Promise<void>,
  ): Promise<void> {
    await this.#client.stream(`/audit/export?${new URLSearchParams(query)}`, AUDIT_TIMEOUT_MS, take);
  }
}
