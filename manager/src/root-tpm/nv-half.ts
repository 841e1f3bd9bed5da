import {
  type Entity,
  NvAttribute as N,
  NV_Write,
  type NvEntity,
  type Session,
  type Tpm,
  withSession,
} from 'tpm2-ts-bindings';
import { barrier } from 'vtpm-common';
import { SECRET_BYTES } from './enrolment.js';
import { checkWritten, defineIndex, type NvShape, type PlannedIndex } from './nv-index.js';

/** Read by policy, written by the owner, who can so erase the past. */
export function nvHalfShape(authPolicy: Buffer): NvShape {
  return { attributes: N.POLICYREAD | N.OWNERWRITE | N.NO_DA, authPolicy, dataSize: SECRET_BYTES };
}

/** Makes the index with the NV half in it. @param session salted, encrypting to the TPM */
export async function writeNvHalf(
  tpm: Tpm,
  session: Session,
  owner: Entity,
  planned: PlannedIndex,
  half: Buffer,
): Promise<NvEntity> {
  const nvIndex = await defineIndex(tpm, session, owner, planned);
  barrier('rotation.defined');
  await tpm.run(NV_Write, { authHandle: withSession(owner, session), nvIndex }, { data: half, offset: 0 });
  return checkWritten(tpm, planned);
}
