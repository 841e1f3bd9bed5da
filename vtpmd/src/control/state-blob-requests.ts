import type { StateBlobType } from '../state-blob/state-blobs.js';
import type { Outcome } from './actions.js';
import { DONE } from './common-actions.js';
import type { ControlRequest } from './request.js';
import { ControlRefusal, RESULT } from './results.js';

const BLOB_TYPES: Readonly<Record<number, StateBlobType>> = { 1: 'permanent', 2: 'volatile', 3: 'savestate' };

/** Of GET_STATEBLOB and SET_STATEBLOB. @throws ControlRefusal */
export function blobTypeOf({ body }: Pick<ControlRequest, 'body'>): StateBlobType {
  const type = BLOB_TYPES[body.readUInt32BE(4)];
  if (!type) throw new ControlRefusal(RESULT.BadParameter, 'there is no such kind of state');
  return type;
}

/** The answer to GET_STATEBLOB. @param blob undefined where there is none of that type @throws ControlRefusal */
export function blobOutcome(
  { body }: Pick<ControlRequest, 'body'>,
  type: StateBlobType,
  blob: Buffer | undefined,
): Outcome {
  if (!blob) throw new ControlRefusal(RESULT.Retry, `there is no ${type}`);
  const offset = body.readUInt32BE(8);
  if (offset > blob.length) throw new ControlRefusal(RESULT.BadParameter, 'an offset behind the end');
  const content = blob.subarray(offset);
  // state_flags (nothing is encrypted with a key of swtpm's), totlength: all that there is from the offset on.
  return { ...DONE, words: [0, content.length, content.length], content };
}
