import { ProtoError, parseFencingText, type SignedFencing } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import type { MigrationView } from '../migration/view.js';
import { type AdminContext, type AdminRequest, type Answer, bodyOf, ok, type Route, time } from './route.js';

export const migrationRoutes: readonly Route[] = [
  { method: 'GET', path: '/migrations', handle: list },
  { method: 'GET', path: '/migrations/{migration}', handle: view },
  { method: 'POST', path: '/migrations/{migration}/resolve', audits: 'migrate-resolve', handle: resolve },
  { method: 'POST', path: '/migrations/{migration}/accept', handle: accept },
  { method: 'POST', path: '/migrations/{migration}/refuse', handle: refuse },
  { method: 'POST', path: '/migrations/{migration}/cancel', handle: cancel },
];

/** Of a refusal: a code and a sentence for the source's operator. */
const MAX_REASON = 300;

async function list(_: AdminRequest, { service }: AdminContext): Promise<Answer> {
  return ok({ migrations: (await service().migrations.list()).map(describe) });
}

async function view(request: AdminRequest, { service }: AdminContext): Promise<Answer> {
  return ok(describe(await service().migrations.view(migrationOf(request))));
}

async function resolve(request: AdminRequest, { service }: AdminContext): Promise<Answer> {
  const migration = migrationOf(request);
  const { fencing } = await bodyOf(request, ['fencing']);
  const statement = fencing === undefined ? undefined : statementOf(fencing);
  return ok({ migration, ...(await service().migrations.resolve(migration, request.actor, statement)) });
}

async function accept(request: AdminRequest, { service }: AdminContext): Promise<Answer> {
  const migration = migrationOf(request);
  await bodyOf(request, []);
  service().migrations.accept(migration);
  return ok({ migration });
}

async function refuse(request: AdminRequest, { service }: AdminContext): Promise<Answer> {
  const { migrations } = service();
  const migration = migrationOf(request);
  const { code, message } = await bodyOf(request, ['code', 'message']);
  migrations.refuse(migration, `${text('code', code)}: ${text('message', message)}`);
  return ok({ migration });
}

async function cancel(request: AdminRequest, { service }: AdminContext): Promise<Answer> {
  const migration = migrationOf(request);
  await bodyOf(request, []);
  return ok({ migration, cancelled: service().migrations.cancel(migration) });
}

/** The reader's numbers: they stay below 2^53. */
function describe({ incoming, mode, begunAt, since, ...rest }: MigrationView): object {
  return {
    ...rest,
    mode: mode ?? null,
    begunAt: time(begunAt ?? 0),
    since: time(since ?? 0),
    ...(incoming && {
      incoming: { ...incoming, epoch: Number(incoming.epoch), generation: Number(incoming.generation) },
    }),
  };
}

function migrationOf(request: AdminRequest): string {
  const id = request.param('migration');
  if (/^[0-9a-f]{32}$/.test(id)) return id;
  throw new ManagerError('bad-request', 'a migration is named by 32 hex digits, in lower case');
}

function statementOf(fencing: unknown): SignedFencing {
  if (typeof fencing !== 'string') throw new ManagerError('bad-request', '"fencing" is a text');
  try {
    return parseFencingText(fencing);
  } catch (cause) {
    if (!(cause instanceof ProtoError)) throw cause;
    throw new ManagerError('not-fenced', cause.message, { cause });
  }
}

function text(name: string, value: unknown): string {
  if (typeof value === 'string' && value.length <= MAX_REASON) return value;
  throw new ManagerError('bad-request', `"${name}" is a text of at most ${MAX_REASON} characters`);
}
