import { createCipheriv, createDecipheriv, randomBytes } from 'node:crypto';
import { expectLength } from './bytes.js';
import { decode, encode } from './codec.js';
import { ProtoError } from './error.js';
import type { LoadGrant, LoadResponse } from './generated/messages.js';
import { type AgreedBox, DIRECTION } from './load-box.js';

const TAG_BYTES = 16;
/** The key is new for each grant. */
const NONCE = Buffer.alloc(12);

/**
 * The answer to a Load. A box costs a worker, whose code is not compiled yet, 0.3 ms for each kilobyte: so the state stands
 * beside it, under a key that is in it.
 */
export function sealLoadGrant(box: AgreedBox, grant: Omit<LoadGrant, 'direction'>): Required<LoadResponse> {
  const key = randomBytes(32);
  const plain = encode('LoadGrant', { ...grant, direction: DIRECTION.LoadGrant });
  try {
    const cipher = createCipheriv('aes-256-gcm', key, NONCE);
    const sealed = Buffer.concat([cipher.update(plain), cipher.final(), cipher.getAuthTag()]);
    return { ...box.seal('LoadGrantKey', { key }), sealed };
  } finally {
    plain.fill(0);
    key.fill(0);
  }
}

/**
 * What `sealLoadGrant` made, or a manager that puts the whole grant into the box.
 * @throws ProtoError `forged` where it is not of the manager that the box is agreed with, or was altered; `malformed`
 */
export function openLoadGrant(box: AgreedBox, response: LoadResponse): LoadGrant {
  const { sealed } = response;
  if (sealed === undefined) return box.open('LoadGrant', response);
  if (sealed.length < TAG_BYTES) throw new ProtoError('malformed', 'LoadGrant: it has no tag');
  const { key } = box.open('LoadGrantKey', response);
  expectLength('key of the grant', key, 32);
  try {
    const decipher = createDecipheriv('aes-256-gcm', key, NONCE);
    decipher.setAuthTag(sealed.subarray(-TAG_BYTES));
    // GCM has given out everything with `update`.
    const plain = decipher.update(sealed.subarray(0, -TAG_BYTES));
    decipher.final();
    const grant = decode('LoadGrant', plain);
    if (grant.direction === DIRECTION.LoadGrant) return grant;
  } catch (cause) {
    if (cause instanceof ProtoError) throw cause;
    throw new ProtoError('forged', 'LoadGrant: it does not open with the key in the box', cause);
  } finally {
    key.fill(0);
  }
  throw new ProtoError('forged', 'LoadGrant: what is sealed is for another direction');
}
