export {
  type AuditLog,
  type AuditLogOptions,
  createAuditLog,
  type OpenedAuditLog,
  openAuditLog,
} from './audit-log.js';
export { verifyChain } from './chain.js';
export {
  AUDIT_ACTIONS,
  AUDIT_VERDICTS,
  type AuditAction,
  type AuditActor,
  type AuditEntry,
  type AuditEvent,
  type AuditVerdict,
} from './entry.js';
export { type AuditHead, decodeAuditHead, EMPTY_HEAD, encodeAuditHead } from './head.js';
export type { AuditKey } from './line.js';
export { Refusals } from './refusals.js';
export { type AuditVerdictView, viewOf } from './verdict.js';
export { allOf, refuseFlaw, verifyAudit } from './verify.js';
export type { AuditFlaw, AuditKeys, AuditReport } from './walk.js';
