import { type AllowedImage, uuidToText } from 'vtpm-proto';
import type { AuditActor, AuditLog } from '../audit/index.js';
import { ManagerError } from '../error.js';
import type { VtpmRegistry, VtpmView } from '../ownership/registry.js';
import type { TrustStore } from '../trust/trust-configuration.js';
import type { Answer } from './http.js';

/** What the admin plane acts on while the manager is unlocked. */
export interface AdminService {
  readonly registry: VtpmRegistry;
  readonly trust: TrustStore;
  readonly audit: AuditLog;
}

export interface AdminRequest {
  readonly method: string;
  readonly path: readonly string[];
  readonly query: URLSearchParams;
  /** @param limit in bytes, where it is not the usual one */
  body(limit?: number): Promise<Record<string, unknown>>;
  /** The caller's uid, for the audit log. */
  readonly actor: AuditActor;
}

const UUID = /^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/;
const DIGEST = /^[0-9a-f]{64}$/;
const DEFAULT_PAGE = 100;
const MAX_PAGE = 1000;

/** Answers a call on vTPMs or images. @throws ManagerError; undefined where there is no such call */
export async function route(request: AdminRequest, service: AdminService): Promise<Answer | undefined> {
  const [collection, id, action, ...more] = request.path;
  if (more.length > 0) return undefined;
  const call = `${request.method} ${collection}${id === undefined ? '' : '/ID'}${action === undefined ? '' : `/${action}`}`;
  switch (call) {
    case 'GET vtpms':
      return await listVtpms(request, service);
    case 'GET vtpms/ID':
      return ok(describe(await service.registry.view(uuid(id))));
    case 'POST vtpms/ID/retire':
      return await retireVtpm(uuid(id), request, service);
    case 'GET images':
      return ok({ images: service.trust.images().map(describeImage) });
    case 'POST images':
      return await allowImage(request, service);
    case 'DELETE images/ID':
      return await removeImage(digest(id), request, service);
    default:
      return undefined;
  }
}

async function listVtpms({ query }: AdminRequest, { registry }: AdminService): Promise<Answer> {
  const after = query.get('after');
  const limit = pageSize(query.get('limit'));
  // One more than asked for says whether there is a next page.
  const ids = registry.list(after === null ? undefined : uuid(after), limit + 1);
  const page = ids.slice(0, limit);
  const vtpms = await Promise.all(page.map(async (id) => describe(await registry.view(id))));
  return ok({ vtpms, ...(ids.length > limit ? { next: page.at(-1) } : {}) });
}

async function retireVtpm(id: string, request: AdminRequest, { registry }: AdminService): Promise<Answer> {
  await registry.retire(id, request.actor);
  return ok({ id, kind: 'retired' });
}

async function allowImage(request: AdminRequest, { trust, audit }: AdminService): Promise<Answer> {
  const body = await request.body();
  const bytes = digest(body.digest);
  const { note } = body;
  if (note !== undefined && typeof note !== 'string') throw new ManagerError('bad-request', '"note" is text');
  const facts = { digest: bytes.toString('hex'), ...(note !== undefined && { note }) };
  await audit.append({ actor: request.actor, action: 'image-allow', verdict: 'done', facts });
  return { status: 201, body: describeImage(await trust.allowImage(bytes, note, BigInt(Date.now()))) };
}

async function removeImage(
  bytes: Buffer,
  request: AdminRequest,
  { trust, audit }: AdminService,
): Promise<Answer> {
  const hex = bytes.toString('hex');
  await audit.append({
    actor: request.actor,
    action: 'image-remove',
    verdict: 'done',
    facts: { digest: hex },
  });
  if (!(await trust.removeImage(bytes))) {
    return {
      status: 404,
      body: { error: { code: 'bad-request', message: `image ${hex} is not on the list` } },
    };
  }
  return ok({ digest: hex });
}

function describe({ header, savedBytes, isConnected }: VtpmView): { id: string } & Record<string, unknown> {
  const { session } = header;
  return {
    id: uuidToText(header.vtpmUuid),
    vmUuid: uuidToText(header.vmUuid),
    kind: header.kind === 'RETIRED' ? 'retired' : 'live',
    generation: Number(header.generation),
    epoch: Number(header.epoch),
    savedAt: time(header.savedAt),
    createdAt: time(header.createdAt),
    savedBytes,
    marks: header.marks,
    libtpmsVersion: header.libtpmsVersion,
    session: session
      ? {
          connected: isConnected,
          imageDigest: Buffer.from(session.imageDigest).toString('hex'),
          isolation: session.isolation,
        }
      : null,
  };
}

function describeImage(image: AllowedImage) {
  return {
    digest: Buffer.from(image.digest).toString('hex'),
    note: image.note,
    allowedAt: time(image.allowedAt),
  };
}

function ok(body: object): Answer {
  return { status: 200, body };
}

function uuid(value: string | undefined): string {
  if (value === undefined || !UUID.test(value)) {
    throw new ManagerError('bad-request', 'a vTPM is named by its UUID, in lower case');
  }
  return value;
}

function digest(value: unknown): Buffer {
  if (typeof value !== 'string' || !DIGEST.test(value)) {
    throw new ManagerError('bad-request', 'an image digest is 64 hex digits, in lower case');
  }
  return Buffer.from(value, 'hex');
}

function pageSize(value: string | null): number {
  if (value === null) return DEFAULT_PAGE;
  const limit = /^\d{1,4}$/.test(value) ? Number(value) : 0;
  if (limit < 1 || limit > MAX_PAGE) {
    throw new ManagerError('bad-request', `"limit" is a whole number from 1 to ${MAX_PAGE}`);
  }
  return limit;
}

function time(milliseconds: bigint): string | null {
  return milliseconds === 0n ? null : new Date(Number(milliseconds)).toISOString();
}
