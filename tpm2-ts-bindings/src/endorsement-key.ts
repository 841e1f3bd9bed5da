import { Alg, Curve, Rh } from './constants.js';
import { type Authorized, permanent, withPassword } from './entity.js';
import type { PolicyStep } from './policy-step.js';
import { NvIndex } from './registry.js';

/**
 * Endorsement keys as the EK Credential Profile for TPM Family 2.0, version 2.5, annex B, has them. L: the low range,
 * with `unique` of zeros and PolicyA. H: the high range, with an empty `unique` and PolicyB. H-5 (SM2) is not here.
 */
export type EndorsementKeyName = 'L-1' | 'L-2' | 'H-1' | 'H-2' | 'H-3' | 'H-4' | 'H-6' | 'H-7';

/** What distinguishes one kind from another. */
export interface EndorsementKeyKind {
  readonly key:
    | { readonly type: typeof Alg.RSA; readonly keyBits: number }
    | { readonly type: typeof Alg.ECC; readonly curveID: number };
  /** Also the hash of the policy, so of a session that satisfies it. */
  readonly nameAlg: number;
  /** Of AES in CFB mode, for what is wrapped to the key. */
  readonly symmetricBits: 128 | 256;
  readonly certificateIndex: number;
  readonly templateIndex: number;
}

const rsa = (keyBits: number) => ({ type: Alg.RSA, keyBits });
const ecc = (curveID: number) => ({ type: Alg.ECC, curveID });

const KINDS: Readonly<Record<EndorsementKeyName, EndorsementKeyKind>> = {
  'L-1': kind(rsa(2048), Alg.SHA256, 128, NvIndex.EK_CERTIFICATE_L1, NvIndex.EK_TEMPLATE_L1),
  'L-2': kind(ecc(Curve.NIST_P256), Alg.SHA256, 128, NvIndex.EK_CERTIFICATE_L2, NvIndex.EK_TEMPLATE_L2),
  'H-1': kind(rsa(2048), Alg.SHA256, 128, NvIndex.EK_CERTIFICATE_H1, NvIndex.EK_TEMPLATE_H1),
  'H-2': kind(ecc(Curve.NIST_P256), Alg.SHA256, 128, NvIndex.EK_CERTIFICATE_H2, NvIndex.EK_TEMPLATE_H2),
  'H-3': kind(ecc(Curve.NIST_P384), Alg.SHA384, 256, NvIndex.EK_CERTIFICATE_H3, NvIndex.EK_TEMPLATE_H3),
  'H-4': kind(ecc(Curve.NIST_P521), Alg.SHA512, 256, NvIndex.EK_CERTIFICATE_H4, NvIndex.EK_TEMPLATE_H4),
  'H-6': kind(rsa(3072), Alg.SHA384, 256, NvIndex.EK_CERTIFICATE_H6, NvIndex.EK_TEMPLATE_H6),
  'H-7': kind(rsa(4096), Alg.SHA384, 256, NvIndex.EK_CERTIFICATE_H7, NvIndex.EK_TEMPLATE_H7),
};

function kind(
  key: EndorsementKeyKind['key'],
  nameAlg: number,
  symmetricBits: 128 | 256,
  certificateIndex: number,
  templateIndex: number,
): EndorsementKeyKind {
  return { key, nameAlg, symmetricBits, certificateIndex, templateIndex };
}

export const ENDORSEMENT_KEY_NAMES = Object.keys(KINDS) as readonly EndorsementKeyName[];

export function endorsementKeyKind(name: EndorsementKeyName): EndorsementKeyKind {
  return KINDS[name];
}

export function isLowRange(name: EndorsementKeyName): boolean {
  return name === 'L-1' || name === 'L-2';
}

/**
 * PolicyC: PolicyAuthorizeNV with the index `NvIndex.EK_POLICY_…` (EK Credential Profile, B.6.4). It is there for a
 * maker who filled that index; the policies below take the other branch.
 */
const POLICY_C: ReadonlyMap<number, Buffer> = new Map(
  (
    [
      [Alg.SHA256, '3767e2edd43ff45a3a7e1eaefcef78643dca964632e7aad82c673a30d8633fde'],
      [
        Alg.SHA384,
        'd6032ce61f2fb3c240eb3cf6a33237ef2b6a16f4293c22b455e261cffd217ad5b4947c2d73e63005eed2dc2b3593d165',
      ],
      [
        Alg.SHA512,
        '589ee1e146544716e8deafe6db247b01b81e9f9c7dd16b814aa159138749105fba5388dd1dea702f35240c184933121e' +
          '2c61b8f50d3ef91393a49a38c3f73fc8',
      ],
    ] as const
  ).map(([alg, hex]) => [alg, Buffer.from(hex, 'hex')]),
);

/** The endorsement hierarchy with an empty authValue. */
const ENDORSEMENT = withPassword(permanent(Rh.ENDORSEMENT));

/**
 * The policy of an endorsement key: PolicyA asks for the authValue of the endorsement hierarchy, PolicyB for that or
 * what PolicyC asks for (EK Credential Profile, B.6). Its digest is the template's `authPolicy`.
 * @param by the endorsement hierarchy with what authorises its use
 */
export function endorsementPolicy(name: EndorsementKeyName, by: Authorized = ENDORSEMENT): PolicyStep[] {
  const policyA: PolicyStep[] = [{ assert: 'secret', of: by }];
  const policyC = POLICY_C.get(endorsementKeyKind(name).nameAlg);
  if (isLowRange(name) || policyC === undefined) return policyA;
  return [{ assert: 'or', branches: [policyA, policyC], take: 0 }];
}
