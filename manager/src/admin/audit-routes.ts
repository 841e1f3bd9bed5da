import { type AuditEntry, type AuditLog, verifyChain, viewOf } from '../audit/index.js';
import { ManagerError } from '../error.js';
import { sendStream } from './http.js';
import {
  type AdminContext,
  type AdminRequest,
  type Answer,
  ok,
  onlyKnown,
  type RespondingAnswer,
  type Route,
  wholeNumber,
} from './route.js';

const DEFAULT_TAIL = 100;
const MAX_TAIL = 1000;

export const auditRoutes: readonly Route[] = [
  { method: 'GET', path: '/audit', handle: tail },
  { method: 'GET', path: '/audit/verify', handle: verify },
  { method: 'GET', path: '/audit/export', handle: exportLines },
];

async function tail({ query }: AdminRequest, { service }: AdminContext): Promise<Answer> {
  const { audit } = service();
  onlyKnown(query, ['tail']);
  const entries = await audit.tail(wholeNumber(query, 'tail', 1, MAX_TAIL) ?? DEFAULT_TAIL);
  return ok({ length: Number(audit.head.length), entries: entries.map(describeEntry) });
}

/** While the manager is locked there are no keys: the chain alone is verified then, which is said. */
async function verify(_: AdminRequest, { service, auditPath }: AdminContext): Promise<Answer> {
  let audit: AuditLog;
  try {
    ({ audit } = service());
  } catch (error) {
    const { code, message } = ManagerError.from(error);
    if (code !== 'locked') throw error;
    return ok(viewOf(await verifyChain(auditPath), message));
  }
  return ok(viewOf(await audit.verify()));
}

async function exportLines(
  { query, actor }: AdminRequest,
  { service }: AdminContext,
): Promise<RespondingAnswer> {
  const { audit } = service();
  onlyKnown(query, ['from', 'to']);
  const { length } = audit.head;
  const from = wholeNumber(query, 'from', 1, Number.MAX_SAFE_INTEGER) ?? 1;
  const to = wholeNumber(query, 'to', 1, Number.MAX_SAFE_INTEGER) ?? Number(length);
  if (from > to || from > length) {
    throw new ManagerError('bad-request', `the log has entries 1 to ${length}; "from" is at most "to"`);
  }
  const lines = audit.exportEntries(BigInt(from), BigInt(to));
  await audit.append({
    actor,
    action: 'audit-export',
    verdict: 'done',
    facts: { from: String(from), to: String(to) },
  });
  return (response) => sendStream(response, 'application/x-ndjson', lines);
}

/** The reader's numbers: they stay below 2^53. */
function describeEntry({ n, epoch, generation, ...rest }: AuditEntry): object {
  return {
    n: Number(n),
    ...rest,
    ...(epoch !== undefined && { epoch: Number(epoch) }),
    ...(generation !== undefined && { generation: Number(generation) }),
  };
}
