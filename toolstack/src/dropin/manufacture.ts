import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import {
  Alg,
  createPrimary,
  defineNvIndex,
  type EndorsementKeyName,
  EvictControl,
  endorsementKeyKind,
  endorsementKeyTemplate,
  mask,
  NV_Write,
  NV_WriteLock,
  NvAttribute,
  NvIndex,
  PCR_Allocate,
  Pt,
  type Public,
  permanent,
  Rh,
  readNvIndex,
  readProperty,
  type Tpm,
  whileLoaded,
  withPassword,
} from 'tpm2-ts-bindings';
import type { CertificateTool, TpmDescription } from './certificates.js';
import { DropinRefusal } from './refusal.js';
import type { PcrBank, PcrBanks } from './setup-arguments.js';

/** The endorsement keys that swtpm_setup makes, and where it keeps them. */
const KEYS: readonly { readonly name: EndorsementKeyName; readonly handle: number; readonly file: string }[] =
  [
    { name: 'L-1', handle: 0x81010001, file: 'ek-rsa2048.crt' },
    { name: 'H-3', handle: 0x81010016, file: 'ek-secp384r1.crt' },
  ];

const OWNER = withPassword(permanent(Rh.OWNER));
const ENDORSEMENT = withPassword(permanent(Rh.ENDORSEMENT));
const PLATFORM = withPassword(permanent(Rh.PLATFORM));

/** Of the indices with certificates: everybody reads them, nobody but the platform writes or removes them. */
const CERTIFICATE_ATTRIBUTES = mask(
  NvAttribute.PPWRITE,
  NvAttribute.WRITEDEFINE,
  NvAttribute.PPREAD,
  NvAttribute.OWNERREAD,
  NvAttribute.AUTHREAD,
  NvAttribute.NO_DA,
  NvAttribute.PLATFORMCREATE,
);

/** The least of the sizes that TPMs take in one NV_Write. */
const NV_CHUNK = 512;

export interface Manufacture {
  /** Undefined: keys without certificates. */
  readonly certificates: CertificateTool | undefined;
  readonly hasPlatformCertificate: boolean;
  readonly locksNvram: boolean;
  /** A directory that gets copies of the endorsement certificates. */
  readonly copiesTo: string | undefined;
}

/**
 * Makes what a maker of TPMs puts into one: endorsement keys at their handles, and certificates in their indices. The keys
 * are those of the standard templates, so whoever makes them anew gets the same.
 * @returns a line for each thing that was made @throws TpmError, DropinRefusal
 */
export async function manufacture(tpm: Tpm, options: Manufacture): Promise<string[]> {
  const made: string[] = [];
  for (const { name, handle, file } of KEYS) {
    const key = await persistKey(tpm, name, handle);
    made.push(`endorsement key at 0x${handle.toString(16)}`);
    if (!options.certificates) continue;
    const { certificateIndex } = endorsementKeyKind(name);
    const description = await describe(tpm);
    const certificate = options.certificates.issue('ek', key, description);
    if (options.copiesTo !== undefined) writeFileSync(join(options.copiesTo, file), certificate);
    await store(tpm, certificateIndex, certificate, options.locksNvram);
    made.push(`its certificate in NV index 0x${certificateIndex.toString(16)}`);
    if (!options.hasPlatformCertificate || name !== 'L-1') continue;
    const platform = options.certificates.issue('platform', key, description);
    await store(tpm, NvIndex.PLATFORM_CERTIFICATE, platform, options.locksNvram);
    made.push(`a platform certificate in NV index 0x${NvIndex.PLATFORM_CERTIFICATE.toString(16)}`);
  }
  return made;
}

async function persistKey(tpm: Tpm, name: EndorsementKeyName, handle: number): Promise<Public> {
  const template = endorsementKeyTemplate(name);
  return await whileLoaded(tpm, createPrimary(tpm, template, { hierarchy: ENDORSEMENT }), async (key) => {
    await tpm.run(EvictControl, { auth: OWNER, objectHandle: key }, { persistentHandle: handle });
    return key.publicArea.value;
  });
}

async function describe(tpm: Tpm): Promise<TpmDescription> {
  const [specificationLevel = 0, specificationRevision = 0, firmwareVersion = 0] = [
    await readProperty(tpm, Pt.LEVEL),
    await readProperty(tpm, Pt.REVISION),
    await readProperty(tpm, Pt.FIRMWARE_VERSION_1),
  ];
  return { specificationLevel, specificationRevision, firmwareVersion };
}

async function store(tpm: Tpm, nvIndex: number, content: Buffer, isLocked: boolean): Promise<void> {
  await defineNvIndex(tpm, PLATFORM, {
    nvIndex,
    attributes: CERTIFICATE_ATTRIBUTES,
    dataSize: content.length,
  });
  for (let offset = 0; offset < content.length; offset += NV_CHUNK) {
    const data = content.subarray(offset, offset + NV_CHUNK);
    // Its Name changes with the first write.
    const index = await indexAt(tpm, nvIndex);
    await tpm.run(NV_Write, { authHandle: PLATFORM, nvIndex: index }, { data, offset });
  }
  if (isLocked) {
    await tpm.run(NV_WriteLock, { authHandle: PLATFORM, nvIndex: await indexAt(tpm, nvIndex) }, {});
  }
}

async function indexAt(
  tpm: Tpm,
  handle: number,
): Promise<NonNullable<Awaited<ReturnType<typeof readNvIndex>>>> {
  const index = await readNvIndex(tpm, handle);
  if (index) return index;
  throw new DropinRefusal(`NV index 0x${handle.toString(16)} is gone while it is written`);
}

const BANKS: Readonly<Record<PcrBank, number>> = {
  sha1: Alg.SHA1,
  sha256: Alg.SHA256,
  sha384: Alg.SHA384,
  sha512: Alg.SHA512,
};
const ALL_REGISTERS = Array.from({ length: 24 }, (_, pcr) => pcr);

/** Which PCR banks it has from the next power-on on. @throws TpmError, DropinRefusal */
export async function allocatePcrBanks(tpm: Tpm, banks: PcrBanks): Promise<void> {
  const pcrAllocation = Object.entries(BANKS).map(([name, hash]) => ({
    hash,
    pcrs: banks === 'all' || banks.some((bank) => bank === name) ? ALL_REGISTERS : [],
  }));
  const { allocationSuccess } = await tpm.run(PCR_Allocate, { authHandle: PLATFORM }, { pcrAllocation });
  if (!allocationSuccess) {
    throw new DropinRefusal(
      `the TPM cannot have the PCR banks ${banks === 'all' ? 'that it has' : banks.join(', ')}`,
    );
  }
}
