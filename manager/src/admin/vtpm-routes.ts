import { type Arrival, type Departure, type RecordHeader, type Stay, uuidToText } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import type { VtpmRegistry, VtpmView } from '../ownership/registry.js';
import { isDeparting, KIND_NAMES } from '../records/index.js';
import {
  type AdminContext,
  type AdminRequest,
  type Answer,
  isUuid,
  ok,
  onlyKnown,
  type Route,
  time,
  wholeNumber,
} from './route.js';

type Retirement = NonNullable<RecordHeader['retirement']>;

const DEFAULT_PAGE = 100;
const MAX_PAGE = 1000;
/** A record may have 500 KB, of which a page keeps its header. */
const READS_AT_ONCE = 8;

export const vtpmRoutes: readonly Route[] = [
  { method: 'GET', path: '/vtpms', handle: listVtpms },
  {
    method: 'GET',
    path: '/vtpms/{id}',
    handle: async (request, context) => {
      const { registry } = context.service();
      return ok(describe(await registry.view(uuid(request.param('id'))), context));
    },
  },
  { method: 'POST', path: '/vtpms/{id}/retire', audits: 'retire', handle: retireVtpm },
];

async function listVtpms({ query }: AdminRequest, context: AdminContext): Promise<Answer> {
  const { registry } = context.service();
  onlyKnown(query, ['after', 'limit']);
  const after = query.get('after');
  const limit = wholeNumber(query, 'limit', 1, MAX_PAGE) ?? DEFAULT_PAGE;
  // One more than asked for says whether there is a next page.
  const ids = registry.list(after === null ? undefined : uuid(after), limit + 1);
  const page = ids.slice(0, limit);
  const vtpms = await describeAll(page, registry, context);
  return ok({ vtpms, ...(ids.length > limit ? { next: page.at(-1) } : {}) });
}

async function describeAll(
  ids: readonly string[],
  registry: VtpmRegistry,
  context: AdminContext,
): Promise<object[]> {
  const described: object[] = [];
  for (let from = 0; from < ids.length; from += READS_AT_ONCE) {
    const views = ids.slice(from, from + READS_AT_ONCE).map((id) => registry.view(id));
    for (const view of await Promise.all(views)) described.push(describe(view, context));
  }
  return described;
}

async function retireVtpm(request: AdminRequest, { service }: AdminContext): Promise<Answer> {
  const id = uuid(request.param('id'));
  await service().registry.retire(id, request.actor);
  return ok({ id, kind: 'retired' });
}

function describe({ header, savedBytes, isConnected }: VtpmView, context: AdminContext): object {
  const { session } = header;
  return {
    id: uuidToText(header.vtpmUuid),
    vmUuid: uuidToText(header.vmUuid),
    kind: KIND_NAMES[header.kind],
    migrating: isDeparting(header),
    movedTo:
      header.kind === 'MOVED' && header.departure ? nameOf(header.departure.destination, context) : null,
    generation: Number(header.generation),
    epoch: Number(header.epoch),
    savedAt: time(header.savedAt),
    createdAt: time(header.createdAt),
    savedBytes,
    marks: header.marks,
    isSuspended: header.suspension !== undefined,
    libtpmsVersion: header.libtpmsVersion,
    session: session
      ? {
          connected: isConnected,
          imageDigest: Buffer.from(session.imageDigest).toString('hex'),
          isolation: session.isolation,
        }
      : null,
    departure: header.departure ? describeDeparture(header.departure, context) : null,
    lineage: header.lineage.map((stay) => describeStay(stay, context)),
    unsettled: header.unsettled.map((arrival) => describeArrival(arrival, context)),
    erasure: header.retirement ? describeErasure(header.retirement, context) : null,
  };
}

/** Where it is on its way to, or lives now. */
function describeDeparture(
  { migrationId, destination, at, mode, ...went }: Departure,
  context: AdminContext,
): object {
  return {
    migration: hex(migrationId),
    host: hex(destination),
    peer: peerOf(destination, context),
    at: time(at),
    mode: mode.toLowerCase(),
    epoch: Number(went.epoch),
    generation: Number(went.generation),
  };
}

function describeStay({ migrationId, host, lastEpoch, lastGeneration }: Stay, context: AdminContext): object {
  return {
    host: hex(host),
    peer: peerOf(host, context),
    lastEpoch: Number(lastEpoch),
    lastGeneration: Number(lastGeneration),
    migration: hex(migrationId),
  };
}

function describeArrival({ migrationId, source }: Arrival, context: AdminContext): object {
  return { migration: hex(migrationId), host: hex(source), peer: peerOf(source, context) };
}

/** null where it is this host, or none that is a peer now. */
function peerOf(hostId: Uint8Array, { service }: AdminContext): string | null {
  return service().trust.peerById(hostId)?.name ?? null;
}

function nameOf(hostId: Uint8Array, context: AdminContext): string {
  return peerOf(hostId, context) ?? hex(hostId);
}

function hex(bytes: Uint8Array): string {
  return Buffer.from(bytes).toString('hex');
}

/** Of a retired one: whether its state is unreadable on old disks too, and if not, from when on. */
function describeErasure({ keyId, at }: Retirement, { erasure }: AdminContext): object {
  const { isDone, due } = erasure(keyId);
  return { isDone, retiredAt: time(at), due: isDone || due === undefined ? null : time(due) };
}

/** @throws ManagerError `bad-request` */
function uuid(value: string): string {
  if (isUuid(value)) return value;
  throw new ManagerError('bad-request', 'a vTPM is named by its UUID, in lower case');
}
