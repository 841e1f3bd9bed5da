import { decode, type ObjectEntity, objectEntity, tpmtPublic } from 'tpm2-ts-bindings';

/** The public half of a key that is in another host's TPM, with its Name. @throws TpmError `malformed`, `usage` */
export function readPublicKey(bytes: Uint8Array, what: string): ObjectEntity {
  const copy = Buffer.from(bytes);
  return objectEntity(0, { bytes: copy, value: decode(tpmtPublic, copy, what) });
}
