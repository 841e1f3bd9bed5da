/**
 * Handles that the TCG has given a meaning (Registry of Reserved TPM 2.0 Handles and Localities; EK Credential Profile
 * for TPM Family 2.0, 2.2.1). What is not listed may be used by others.
 */

/**
 * NV indices. `…_NONCE` and `…_TEMPLATE` are there only where the EK is not made from the default template. In the high
 * range a template comes right after its certificate.
 */
export const NvIndex = {
  EK_CERTIFICATE_L1: 0x01c00002,
  EK_NONCE_L1: 0x01c00003,
  EK_TEMPLATE_L1: 0x01c00004,
  EK_CERTIFICATE_L2: 0x01c0000a,
  EK_NONCE_L2: 0x01c0000b,
  EK_TEMPLATE_L2: 0x01c0000c,
  EK_CERTIFICATE_H1: 0x01c00012,
  EK_TEMPLATE_H1: 0x01c00013,
  EK_CERTIFICATE_H2: 0x01c00014,
  EK_TEMPLATE_H2: 0x01c00015,
  EK_CERTIFICATE_H3: 0x01c00016,
  EK_TEMPLATE_H3: 0x01c00017,
  EK_CERTIFICATE_H4: 0x01c00018,
  EK_TEMPLATE_H4: 0x01c00019,
  /** On SM2 with SM3 and SM4, which this package does not have. */
  EK_CERTIFICATE_H5: 0x01c0001a,
  EK_CERTIFICATE_H6: 0x01c0001c,
  EK_TEMPLATE_H6: 0x01c0001d,
  EK_CERTIFICATE_H7: 0x01c0001e,
  EK_TEMPLATE_H7: 0x01c0001f,
  /** What the second branch of PolicyB obeys, by the hash of the policy. */
  EK_POLICY_SHA256: 0x01c07f01,
  EK_POLICY_SHA384: 0x01c07f02,
  EK_POLICY_SHA512: 0x01c07f03,
  PLATFORM_CERTIFICATE: 0x01c08000,
} as const;

/** Handles from `first` to `last`, both of them included. */
export interface HandleRange {
  readonly first: number;
  readonly last: number;
}

/** Who may define which NV indices. */
export const NvRange = {
  TPM_MANUFACTURER: { first: 0x01000000, last: 0x013fffff },
  PLATFORM_MANUFACTURER: { first: 0x01400000, last: 0x017fffff },
  OWNER: { first: 0x01800000, last: 0x01bfffff },
  TCG: { first: 0x01c00000, last: 0x01ffffff },
  /** Certificates between those of the EKs and a root, one after the other. */
  EK_CERTIFICATE_CHAIN: { first: 0x01c00100, last: 0x01c001ff },
} as const satisfies Readonly<Record<string, HandleRange>>;

/** Where keys are commonly made persistent; of endorsement keys it is a custom, not a rule. */
export const PersistentHandle = {
  SRK: 0x81000001,
  EK_RSA: 0x81010001,
  EK_ECC: 0x81010002,
} as const;

/** Who may make keys persistent where. */
export const PersistentRange = {
  OWNER: { first: 0x81000000, last: 0x817fffff },
  STORAGE_PRIMARY: { first: 0x81000000, last: 0x8100ffff },
  ENDORSEMENT_PRIMARY: { first: 0x81010000, last: 0x8101ffff },
  PLATFORM: { first: 0x81800000, last: 0x81ffffff },
} as const satisfies Readonly<Record<string, HandleRange>>;

export function isInRange(handle: number, range: HandleRange): boolean {
  return handle >= range.first && handle <= range.last;
}
