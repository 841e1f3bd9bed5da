import { Metadata, type StatusObject, status } from '@grpc/grpc-js';
import { ManagerError, type ManagerErrorCode } from '../error.js';

const STATUS: Partial<Record<ManagerErrorCode, status>> = {
  'stale-epoch': status.FAILED_PRECONDITION,
  'verb-missing': status.FAILED_PRECONDITION,
  'already-manufactured': status.FAILED_PRECONDITION,
  retired: status.FAILED_PRECONDITION,
  'wrong-manager': status.FAILED_PRECONDITION,
  'wrong-worker': status.FAILED_PRECONDITION,
  'wrong-vm': status.FAILED_PRECONDITION,
  'ticket-forged': status.PERMISSION_DENIED,
  'ticket-expired': status.PERMISSION_DENIED,
  'unknown-toolstack-key': status.PERMISSION_DENIED,
  'image-not-allowed': status.PERMISSION_DENIED,
  'bad-request': status.INVALID_ARGUMENT,
  'too-large': status.INVALID_ARGUMENT,
  'rate-limited': status.RESOURCE_EXHAUSTED,
  deadline: status.DEADLINE_EXCEEDED,
  'newer-format': status.INVALID_ARGUMENT,
  fenced: status.ABORTED,
  busy: status.UNAVAILABLE,
  'shutting-down': status.UNAVAILABLE,
  locked: status.UNAVAILABLE,
  'unknown-vtpm': status.NOT_FOUND,
  'unknown-peer': status.NOT_FOUND,
  'peer-forbidden': status.PERMISSION_DENIED,
  migrating: status.FAILED_PRECONDITION,
  moved: status.FAILED_PRECONDITION,
  incompatible: status.FAILED_PRECONDITION,
  'store-full': status.UNAVAILABLE,
  'store-corrupt': status.DATA_LOSS,
  'rollback-detected': status.DATA_LOSS,
};

/** The gRPC status of a refusal: code, "<reason>: <sentence>", and the reason alone in the trailer `vtpm-reason`. */
export function statusOf(error: ManagerError): StatusObject {
  const metadata = new Metadata();
  metadata.set('vtpm-reason', error.code);
  return {
    code: STATUS[error.code] ?? status.INTERNAL,
    details: `${error.code}: ${error.message}`,
    metadata,
  };
}

/** What a caller is told of something unforeseen: that it happened, not what it was. */
export function refusal(error: unknown): ManagerError {
  if (error instanceof ManagerError) return error;
  return new ManagerError('internal', 'the manager failed to do this; its log says why', { cause: error });
}
