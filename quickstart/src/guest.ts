import { createHash } from 'node:crypto';
import {
  Alg,
  attestationKeyTemplate,
  CreatePrimary,
  createTpm,
  EvictControl,
  embed,
  FlushContext,
  NV_DefineSpace,
  NV_Increment,
  NV_Read,
  NvAttribute,
  objectEntity,
  openSocket,
  PCR_Extend,
  type PublicArea,
  parsePcrSelection,
  permanent,
  Quote,
  Rh,
  readNvIndex,
  readObject,
  readPcrs,
  srkTemplate,
  type Tpm,
  tpmsNvPublic,
  verifyQuote,
  withPassword,
} from 'tpm2-ts-bindings';

const COUNTER = 0x01500010;
const KEY = 0x81000010;
const NO_DATA = { userAuth: Buffer.alloc(0), data: Buffer.alloc(0) };
const CREATION = { inSensitive: NO_DATA, outsideInfo: Buffer.alloc(0), creationPCR: [] };

/** What a guest's operating system does with its TPM, over the vTPM's raw door. */
export interface Guest {
  readonly tpm: Tpm;
  /** Fingerprint of a key that only this TPM's endorsement seed gives. */
  endorsement(): Promise<string>;
  extend(pcr: number, text: string): Promise<void>;
  pcr(pcr: number): Promise<string>;
  /** A counter whose every step libtpms stores (not orderly, no dictionary attack protection). */
  defineCounter(): Promise<void>;
  increment(): Promise<void>;
  counter(): Promise<bigint>;
  /** Makes a signing key and keeps it in the TPM. @returns its fingerprint */
  makeKey(): Promise<string>;
  keyFingerprint(): Promise<string>;
  /** A quote over PCR 16 with the kept key, checked with node:crypto. @throws where it does not verify */
  quote(nonce: Uint8Array): Promise<void>;
  close(): Promise<void>;
}

export async function connectGuest(door: string): Promise<Guest> {
  const tpm = createTpm(await openSocket(door));
  const owner = withPassword(permanent(Rh.OWNER));
  const counterIndex = async () => {
    const index = await readNvIndex(tpm, COUNTER);
    if (!index) throw new Error('the guest has no counter');
    return index;
  };
  const key = async () => {
    const object = await readObject(tpm, KEY);
    if (!object) throw new Error('the guest has no kept key');
    return object;
  };
  const guest: Guest = {
    tpm,
    async endorsement() {
      const made = await tpm.run(
        CreatePrimary,
        { primaryHandle: withPassword(permanent(Rh.ENDORSEMENT)) },
        { ...CREATION, inPublic: srkTemplate() },
      );
      await tpm.run(FlushContext, {}, { flushHandle: made.objectHandle });
      return fingerprint(made.outPublic);
    },
    async extend(pcr, text) {
      const digest = createHash('sha256').update(text).digest();
      const digests = [{ hashAlg: Alg.SHA256, digest }];
      await tpm.run(PCR_Extend, { pcrHandle: withPassword(permanent(pcr)) }, { digests });
    },
    async pcr(pcr) {
      const [value] = await readPcrs(tpm, parsePcrSelection(`sha256:${pcr}`));
      return value?.toString('hex') ?? '';
    },
    async defineCounter() {
      const { OWNERWRITE, OWNERREAD, AUTHREAD, COUNTER: IS_COUNTER, NO_DA } = NvAttribute;
      const nvPublic = {
        nvIndex: COUNTER,
        nameAlg: Alg.SHA256,
        attributes: OWNERWRITE | OWNERREAD | AUTHREAD | IS_COUNTER | NO_DA,
        authPolicy: Buffer.alloc(0),
        dataSize: 8,
      };
      const publicInfo = embed(tpmsNvPublic, nvPublic);
      await tpm.run(NV_DefineSpace, { authHandle: owner }, { auth: Buffer.alloc(0), publicInfo });
      await guest.increment();
    },
    async increment() {
      await tpm.run(NV_Increment, { authHandle: owner, nvIndex: await counterIndex() }, {});
    },
    async counter() {
      const read = await tpm.run(
        NV_Read,
        { authHandle: owner, nvIndex: await counterIndex() },
        { size: 8, offset: 0 },
      );
      return read.data.readBigUInt64BE();
    },
    async makeKey() {
      const made = await tpm.run(
        CreatePrimary,
        { primaryHandle: owner },
        { ...CREATION, inPublic: attestationKeyTemplate() },
      );
      const object = objectEntity(made.objectHandle, made.outPublic);
      await tpm.run(EvictControl, { auth: owner, objectHandle: object }, { persistentHandle: KEY });
      await tpm.run(FlushContext, {}, { flushHandle: made.objectHandle });
      return fingerprint(made.outPublic);
    },
    async keyFingerprint() {
      return fingerprint((await key()).publicArea);
    },
    async quote(nonce) {
      const signer = await key();
      const selection = parsePcrSelection('sha256:16');
      const quoted = await tpm.run(
        Quote,
        { signHandle: withPassword(signer) },
        { qualifyingData: Buffer.from(nonce), inScheme: { scheme: Alg.NULL }, pcrSelect: selection },
      );
      const values = await readPcrs(tpm, selection);
      verifyQuote(quoted.quoted, quoted.signature, {
        key: signer.publicArea.value,
        nonce,
        selection,
        values,
      });
    },
    close: () => tpm.close(),
  };
  return guest;
}

function fingerprint(area: PublicArea): string {
  return createHash('sha256').update(area.bytes).digest('hex').slice(0, 16);
}
