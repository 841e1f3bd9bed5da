import { decode, MAX_MESSAGE_BYTES, type Messages, ProtoError } from 'vtpm-proto';
import { ManagerError } from '../error.js';

/** @throws ManagerError `too-large`, `bad-request` */
export function readMessage<K extends keyof Messages>(name: K, bytes: Uint8Array): Messages[K] {
  if (bytes.length > MAX_MESSAGE_BYTES) {
    throw new ManagerError(
      'too-large',
      `a ${name} of ${bytes.length} bytes is over the limit of ${MAX_MESSAGE_BYTES}`,
    );
  }
  try {
    return decode(name, bytes);
  } catch (error) {
    if (!(error instanceof ProtoError)) throw error;
    throw new ManagerError('bad-request', `not a ${name}: ${error.message}`, { cause: error });
  }
}
