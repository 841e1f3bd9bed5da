import { sendStream } from '../admin/http.js';
import {
  type AdminContext,
  type AdminRequest,
  type Answer,
  bodyOf,
  consentOf,
  isUuid,
  ok,
  onlyKnown,
  plainOf,
  type RespondingAnswer,
  type Route,
} from '../admin/route.js';
import { ManagerError } from '../error.js';
import { wipe } from '../keys/index.js';
import { MAX_FRAME_BYTES } from './format.js';
import { parseBackupPublic } from './operator-key.js';

/** Names in one request; all of them at once is what the absent list is for. */
const MAX_NAMED = 1000;

export const backupRoutes: readonly Route[] = [
  { method: 'POST', path: '/backup', audits: 'backup', handle: backup },
  { method: 'POST', path: '/restore', audits: 'restore', handle: restore },
];

/** The bytes of a backup. */
async function backup(request: AdminRequest, { service }: AdminContext): Promise<RespondingAnswer> {
  const control = service().backup;
  onlyKnown(request.query, []);
  const { to, vtpms } = await bodyOf(request, ['to', 'vtpms']);
  if (typeof to !== 'string') {
    throw new ManagerError('bad-request', '"to" is the public half of a backup key');
  }
  const bytes = control.backup(request.actor, parseBackupPublic(to), namedIn(vtpms));
  // What is refused is refused with its status, and in the audit log.
  const first = await bytes.next();
  return (response) => sendStream(response, 'application/octet-stream', from(first, bytes));
}

/** One vTPM of a backup; only says what it would do without `?accept-rollback=yes`. */
async function restore(request: AdminRequest, { service }: AdminContext): Promise<Answer> {
  const control = service().backup;
  const isAccepted = consentOf(request.query);
  const body = await request.bytes(MAX_FRAME_BYTES);
  try {
    const plan = isAccepted ? await control.restore(request.actor, body) : await control.plan(body);
    return ok({ isDone: isAccepted, ...plainOf(plan) });
  } finally {
    // The state in the clear, of which every other view is a part.
    wipe(body);
  }
}

async function* from(
  first: IteratorResult<Buffer, void>,
  rest: AsyncGenerator<Buffer, void>,
): AsyncGenerator<Buffer> {
  try {
    if (!first.done) yield first.value;
    yield* rest;
  } finally {
    // A reader that is gone ends the backup with the first chunk.
    await rest.return();
  }
}

function namedIn(vtpms: unknown): readonly string[] | undefined {
  if (vtpms === undefined) return undefined;
  const isList = Array.isArray(vtpms) && vtpms.length > 0 && vtpms.length <= MAX_NAMED;
  if (!isList || !vtpms.every((id) => typeof id === 'string' && isUuid(id))) {
    throw new ManagerError('bad-request', `"vtpms" is a list of 1 to ${MAX_NAMED} UUIDs, in lower case`);
  }
  return vtpms as string[];
}
