import {
  Alg,
  Cap,
  Create,
  CreatePrimary,
  Curve,
  EvictControl,
  FlushContext,
  GetCapability,
  Ht,
  Load,
  LoadExternal,
  listHandles,
  NV_DefineSpace,
  NV_Increment,
  NV_Read,
  NV_ReadPublic,
  NV_UndefineSpace,
  NV_Write,
  PCR_Read,
  PolicyAuthorize,
  PolicyGetDigest,
  PolicyNV,
  PolicyPCR,
  Pt,
  Rc,
  ReadPublic,
  readObject,
  readPcrs,
  readProperty,
  StartAuthSession,
  type Tpm,
  TpmError,
  Unseal,
  VerifySignature,
} from 'tpm2-ts-bindings';
import type { RootTpmEnrolment } from './enrolment.js';
import { type IndexState, stateOf } from './nv-counter.js';
import { unfitness } from './srk.js';
import { identify } from './start.js';

/** What a TPM is like, found by commands that only read. Nothing is compared with what it should be. */
export type TpmFacts =
  | { /** A software TPM before TPM2_Startup, which this does not send. */ readonly isStarted: false }
  | ({ readonly isStarted: true } & StartedFacts);

export interface StartedFacts {
  readonly manufacturer: string;
  readonly firmwareVersion: string;
  /** Algorithms and commands that are needed and not there. */
  readonly missing: readonly string[];
  /** PCRs of the SHA-256 bank; empty where it is off. */
  readonly sha256Bank: readonly number[];
  /** Values of PCR 0 to 15 of that bank, hex. */
  readonly pcrs: Readonly<Record<number, string>>;
  readonly isOwnerEnabled: boolean;
  readonly hasOwnerPassword: boolean;
  readonly lockout: {
    readonly isLocked: boolean;
    readonly failures: number;
    readonly recoverySeconds: number;
  };
  /** Objects and sessions of others that are loaded now. */
  readonly loaded: number;
  /** undefined: nothing is at the handle. */
  readonly srk: { readonly name: string; readonly flaw: string | undefined } | undefined;
  /** The enrolled NV indices; undefined where there is no enrolment. */
  readonly nvHalf: IndexState | undefined;
  readonly anchorCounter: IndexState | undefined;
  readonly revocationCounter: IndexState | undefined;
  /** For how many more counters the NV space suffices, by the TPM's own estimate; undefined where it gives none. */
  readonly countersLeft: number | undefined;
}

/** TPM properties (TPM_PT, Part 2 table 23) and their bits (TPMA_PERMANENT, TPMA_STARTUP_CLEAR). */
const LOCKOUT_INTERVAL = 0x210;
const OWNER_AUTH_SET = 1 << 0;
const IN_LOCKOUT = 1 << 9;
const OWNER_ENABLED = 1 << 1;

const COMMANDS = {
  CreatePrimary,
  Create,
  Load,
  Unseal,
  EvictControl,
  FlushContext,
  ReadPublic,
  StartAuthSession,
  PolicyPCR,
  PCR_Read,
  NV_DefineSpace,
  NV_UndefineSpace,
  NV_ReadPublic,
  NV_Read,
  NV_Write,
  NV_Increment,
  LoadExternal,
  VerifySignature,
  PolicyNV,
  PolicyAuthorize,
  PolicyGetDigest,
};
const ALGORITHMS = ['SHA256', 'HMAC', 'AES', 'CFB', 'KEYEDHASH'] as const;

/**
 * @param srkHandle of the enrolment, or where init would look for one
 */
export async function examine(
  tpm: Tpm,
  srkHandle: number,
  enrolment: RootTpmEnrolment | undefined,
): Promise<TpmFacts> {
  try {
    await readProperty(tpm, Pt.MANUFACTURER);
  } catch (error) {
    if (TpmError.is(error, Rc.INITIALIZE)) return { isStarted: false };
    throw error;
  }
  const permanent = (await readProperty(tpm, Pt.PERMANENT)) ?? 0;
  const startup = (await readProperty(tpm, Pt.STARTUP_CLEAR)) ?? 0;
  const sha256Bank = await bankOf(tpm);
  const loaded = await Promise.all([Ht.TRANSIENT, Ht.HMAC_SESSION].map((type) => listHandles(tpm, type)));
  const srk = await readObject(tpm, srkHandle);
  return {
    isStarted: true,
    ...(await identify(tpm)),
    missing: await missingOf(tpm),
    sha256Bank,
    pcrs: await valuesOf(tpm, sha256Bank),
    isOwnerEnabled: (startup & OWNER_ENABLED) !== 0,
    hasOwnerPassword: (permanent & OWNER_AUTH_SET) !== 0,
    lockout: {
      isLocked: (permanent & IN_LOCKOUT) !== 0,
      failures: (await readProperty(tpm, Pt.LOCKOUT_COUNTER)) ?? 0,
      recoverySeconds: (await readProperty(tpm, LOCKOUT_INTERVAL)) ?? 0,
    },
    loaded: loaded.flat().length,
    srk: srk && { name: srk.name.toString('hex'), flaw: unfitness(srk) },
    nvHalf:
      enrolment && (await stateOf(tpm, { handle: enrolment.root.nvHandle, name: enrolment.root.nvName })),
    anchorCounter: enrolment && (await stateOf(tpm, enrolment.anchor)),
    revocationCounter: enrolment && (await stateOf(tpm, enrolment.revocation)),
    countersLeft: await readProperty(tpm, Pt.NV_COUNTERS_AVAIL),
  };
}

async function bankOf(tpm: Tpm): Promise<readonly number[]> {
  const { capabilityData } = await tpm.run(
    GetCapability,
    {},
    { capability: Cap.PCRS, property: 0, propertyCount: 64 },
  );
  if (capabilityData.capability !== Cap.PCRS) return [];
  return capabilityData.assignedPCR.find(({ hash }) => hash === Alg.SHA256)?.pcrs ?? [];
}

async function valuesOf(tpm: Tpm, bank: readonly number[]): Promise<Record<number, string>> {
  const pcrs = bank.filter((pcr) => pcr < 16);
  if (pcrs.length === 0) return {};
  const values = await readPcrs(tpm, [{ hash: Alg.SHA256, pcrs }]);
  return Object.fromEntries(pcrs.map((pcr, index) => [pcr, values[index]?.toString('hex') ?? '']));
}

async function missingOf(tpm: Tpm): Promise<string[]> {
  const algorithms = new Set<number>();
  const commands = new Set<number>();
  const curves = new Set<number>();
  const ask = (capability: number, property: number) =>
    tpm.run(GetCapability, {}, { capability, property, propertyCount: 254 });
  for (const [capability, found] of [
    [Cap.ALGS, algorithms],
    [Cap.COMMANDS, commands],
    [Cap.ECC_CURVES, curves],
  ] as const) {
    for (let next = 0, more = true; more; ) {
      const { capabilityData: data, moreData } = await ask(capability, next);
      const page =
        data.capability === Cap.ALGS
          ? data.algorithms.map(({ alg }) => alg)
          : data.capability === Cap.COMMANDS
            ? // TPMA_CC: the command's index is in the low half.
              data.commands.map((attributes) => attributes & 0xffff)
            : data.capability === Cap.ECC_CURVES
              ? data.curves
              : [];
      for (const item of page) found.add(item);
      const last = page.at(-1);
      more = moreData && last !== undefined && last >= next;
      next = (last ?? 0) + 1;
    }
  }
  const hasEcc = algorithms.has(Alg.ECC) && curves.has(Curve.NIST_P256);
  return [
    ...ALGORITHMS.filter((name) => !algorithms.has(Alg[name])),
    ...(hasEcc ? [] : ['ECC P-256']),
    ...Object.entries(COMMANDS)
      .filter(([, { code }]) => !commands.has(code & 0xffff))
      .map(([name]) => `TPM2_${name}`),
  ];
}
