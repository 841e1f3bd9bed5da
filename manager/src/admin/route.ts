import type { ServerResponse } from 'node:http';
import type { Finding } from 'vtpm-common';
import type { AuditAction, AuditActor, AuditEvent, AuditLog } from '../audit/index.js';
import type { BackupControl } from '../backup/control.js';
import { ManagerError } from '../error.js';
import type { MetricsState } from '../metrics.js';
import type { MigrationControl } from '../migration/control.js';
import type { VtpmRegistry } from '../ownership/registry.js';
import type { PeerControl } from '../peer/control.js';
import type { PlatformControl } from '../platform-control.js';
import type { RescueControl } from '../rescue/control.js';
import type { TrustStore } from '../trust/trust-configuration.js';
import type { Health } from './health.js';

/** What the admin plane acts on while the manager is unlocked. */
export interface AdminService {
  readonly registry: VtpmRegistry;
  readonly trust: TrustStore;
  readonly audit: AuditLog;
  readonly backup: BackupControl;
  readonly migrations: MigrationControl;
  readonly peers: PeerControl;
  readonly rescues: RescueControl;
}

/** The manager as its admin plane sees it. */
export interface AdminContext {
  health(): Health;
  metrics(): MetricsState;
  /** What `GET /doctor` says of the TPM; works while locked too. */
  doctor(): Promise<Finding[]>;
  /** Of the newest file of the audit log. */
  readonly auditPath: string;
  /** @throws ManagerError `locked`, `shutting-down` */
  service(): AdminService;
  /** Of what was under a generation of the root key. @throws ManagerError `locked` */
  erasure(generation: number): {
    /** No old disk opens any more. */
    readonly isDone: boolean;
    /** Unix milliseconds of the rotation that does it, where one is to come by itself. */
    readonly due: number | undefined;
  };
  /** Works while locked too. */
  platform(): PlatformControl;
  /** Writes it into the audit log; while that is closed, when it is open again. @throws ManagerError */
  audit(event: AuditEvent): Promise<void>;
}

export interface AdminRequest {
  readonly query: URLSearchParams;
  /** The segment of the path that stands for `{name}`. */
  param(name: string): string;
  /** @param limit in bytes, where it is not the usual one @throws ManagerError `too-large`, `bad-request` */
  body(limit?: number): Promise<Record<string, unknown>>;
  /** The body as it is. @param limit in bytes @throws ManagerError `too-large` */
  bytes(limit: number): Promise<Buffer>;
  /** The caller's uid, for the audit log. */
  readonly actor: AuditActor;
}

export interface JsonAnswer {
  readonly status: number;
  readonly body: object;
}

/** An answer that writes itself, where it is no JSON or has no end. What it throws before it has begun is a refusal. */
export type RespondingAnswer = (response: ServerResponse) => Promise<void> | void;

export type Answer = JsonAnswer | RespondingAnswer;

/** One call of the admin plane. */
export interface Route {
  readonly method: 'GET' | 'POST' | 'PATCH' | 'DELETE';
  /** `{name}` stands for one segment. */
  readonly path: string;
  /** Of a call that changes something: under which name a refused or failed one is in the audit log. */
  readonly audits?: AuditAction;
  /** @throws ManagerError */
  handle(request: AdminRequest, context: AdminContext): Promise<Answer> | Answer;
}

const UUID = /^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/;

export function isUuid(text: string): boolean {
  return UUID.test(text);
}

export function ok(body: object): JsonAnswer {
  return { status: 200, body };
}

/** Unix milliseconds as ISO 8601 in UTC; 0 is never. */
export function time(milliseconds: bigint | number): string | null {
  return Number(milliseconds) === 0 ? null : new Date(Number(milliseconds)).toISOString();
}

/** @returns undefined where the query does not have it @throws ManagerError `bad-request` */
export function wholeNumber(
  query: URLSearchParams,
  name: string,
  least: number,
  most: number,
): number | undefined {
  const text = query.get(name);
  if (text === null) return undefined;
  const value = /^\d{1,15}$/.test(text) ? Number(text) : -1;
  if (value < least || value > most) {
    throw new ManagerError('bad-request', `"${name}" is a whole number from ${least} to ${most}`);
  }
  return value;
}

/** @throws ManagerError `bad-request`: a misspelt name would be a wish that nobody hears */
export function onlyKnown(query: URLSearchParams, names: readonly string[]): void {
  const unknown = [...query.keys()].find((name) => !names.includes(name));
  if (unknown === undefined) return;
  const known = names.length === 0 ? 'this call takes none' : `there are ${names.join(', ')}`;
  throw new ManagerError('bad-request', `there is no query parameter "${unknown.slice(0, 40)}"; ${known}`);
}

/** Whether what was saved since may be lost. @throws ManagerError `bad-request` */
export function consentOf(query: URLSearchParams): boolean {
  onlyKnown(query, ['accept-rollback']);
  const consent = query.get('accept-rollback');
  if (consent === null || consent === 'yes') return consent === 'yes';
  throw new ManagerError('bad-request', '"accept-rollback" is "yes", or left out');
}

/** Generations and times stay below 2^53. */
export function plainOf(object: object): Record<string, unknown> {
  return Object.fromEntries(
    Object.entries(object).map(([name, value]) => [
      name,
      typeof value === 'bigint' ? Number(value) : (value ?? null),
    ]),
  );
}

/** Where a call leads: to a route with what its path says, or to the methods that there are for the path. */
export type Match =
  | { readonly route: Route; readonly params: ReadonlyMap<string, string> }
  | { readonly allowed: readonly Route['method'][] };

/**
 * @param names members that the body may have
 * @param limit in bytes, where it is not the usual one
 * @throws ManagerError `bad-request` where it has other members: a misspelt one must not be left out in silence
 */
export async function bodyOf(
  request: AdminRequest,
  names: readonly string[],
  limit?: number,
): Promise<Readonly<Record<string, unknown>>> {
  const body = await request.body(limit);
  const other = Object.keys(body).find((name) => !names.includes(name));
  if (other !== undefined) {
    throw new ManagerError('bad-request', `this call takes ${names.join(', ')}, not "${other.slice(0, 40)}"`);
  }
  return body;
}

export function matchRoute(routes: readonly Route[], method: string, path: readonly string[]): Match {
  const here = routes.flatMap((route) => {
    const params = paramsOf(route.path.split('/').slice(1), path);
    return params ? [{ route, params }] : [];
  });
  return (
    here.find(({ route }) => route.method === method) ?? { allowed: here.map(({ route }) => route.method) }
  );
}

function paramsOf(pattern: readonly string[], path: readonly string[]): Map<string, string> | undefined {
  if (pattern.length !== path.length) return undefined;
  const params = new Map<string, string>();
  for (const [i, expected] of pattern.entries()) {
    const found = path[i] ?? '';
    const name = /^\{(\w+)\}$/.exec(expected)?.[1];
    if (name !== undefined) params.set(name, found);
    else if (expected !== found) return undefined;
  }
  return params;
}
