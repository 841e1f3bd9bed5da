import { Alg, decode, type PublicArea, sealedTemplate, tpmtPublic } from 'tpm2-ts-bindings';
import { ManagerError } from '../error.js';

/** Why a sealed object's public area is not what enrolment makes; undefined where it is. */
export function sealedFlaw({ value }: PublicArea, authPolicy: Buffer): string | undefined {
  const wanted = sealedTemplate(authPolicy).value;
  if (value.type !== Alg.KEYEDHASH) return 'it is no sealed data';
  if (value.nameAlg !== wanted.nameAlg) return 'its Name is over another hash';
  // userWithAuth above all: with it set, the empty password would open the object on any platform state.
  if (value.objectAttributes !== wanted.objectAttributes) return 'its attributes are others';
  if (!value.authPolicy.equals(authPolicy)) return 'its policy is another';
  return undefined;
}

/** The public area that the enrolment holds. @throws ManagerError `tpm-fault` where it is damaged */
export function readSealedPublic(base64: string): PublicArea {
  const bytes = Buffer.from(base64, 'base64');
  try {
    return { bytes, value: decode(tpmtPublic, bytes, 'sealedPublic') };
  } catch (cause) {
    throw new ManagerError('tpm-fault', 'the TPM enrolment is damaged; restore it from a backup', { cause });
  }
}
