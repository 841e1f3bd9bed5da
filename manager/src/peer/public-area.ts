import { decode, type PublicArea, tpmtPublic } from 'tpm2-ts-bindings';

/** A TPMT_PUBLIC with its bytes. @throws TpmError `malformed` */
export function readPublicArea(bytes: Uint8Array, what: string): PublicArea {
  const copy = Buffer.from(bytes);
  return { bytes: copy, value: decode(tpmtPublic, copy, what) };
}
