import { timingSafeEqual } from 'node:crypto';
import {
  Alg,
  Create,
  inSession,
  type ObjectEntity,
  type PcrSelection,
  type PublicArea,
  pcrDigest,
  permanent,
  policyDigest,
  Rc,
  Rh,
  readPcrs,
  type Session,
  sealedTemplate,
  type Tpm,
  TpmError,
  wipe,
  withSession,
} from 'tpm2-ts-bindings';
import { ManagerError } from '../error.js';
import { type RootTpmEnrolment, type RootTpmLocation, readSelection } from './enrolment.js';
import { otherNvHalves, removeNvHalf, writeNvHalf } from './nv-half.js';
import { releaseRootKey } from './release.js';
import { deriveRootKey, mixedRandom } from './root-key.js';
import { sealedFlaw } from './sealed.js';
import { findOrCreateSrk, removeSrk, unfit } from './srk.js';
import { identify } from './start.js';

export interface EnrolOptions {
  /** 16 bytes; the root key is another one for each installation. */
  installation: Uint8Array;
  pcrSelection: string;
  srkHandle: number;
  ownerAuth?: Uint8Array;
}

export interface Enrolled {
  readonly enrolment: RootTpmEnrolment;
  /** 32 bytes; the caller wipes it. */
  readonly rootKey: Buffer;
  /** NV indices like the one that was made, there before: nothing is done with them. */
  readonly leftovers: readonly number[];
}

export async function enrol(tpm: Tpm, location: RootTpmLocation, options: EnrolOptions): Promise<Enrolled> {
  if (options.installation.length !== 16)
    throw new ManagerError('bad-request', 'the installation id has 16 bytes');
  const selection = readSelection(options.pcrSelection);
  const ownerAuth = options.ownerAuth ?? new Uint8Array(0);
  const leftovers = await otherNvHalves(tpm);
  const { srk, created } = await findOrCreateSrk(tpm, options.srkHandle, ownerAuth);
  try {
    const enrolled = await enrolUnder(tpm, location, options, { srk, created, selection, ownerAuth });
    return { ...enrolled, leftovers };
  } catch (error) {
    if (created) await removeSrk(tpm, srk, ownerAuth);
    throw error;
  }
}

interface Parent {
  readonly srk: ObjectEntity;
  readonly created: boolean;
  readonly selection: PcrSelection;
  readonly ownerAuth: Uint8Array;
}

async function enrolUnder(
  tpm: Tpm,
  location: RootTpmLocation,
  options: EnrolOptions,
  { srk, created, selection, ownerAuth }: Parent,
): Promise<Omit<Enrolled, 'leftovers'>> {
  const identity = await identify(tpm);
  const owner = permanent(Rh.OWNER, ownerAuth);

  return inSession(tpm, { kind: 'hmac', encrypt: 'both', salt: srk }, async (session) => {
    const authPolicy = await currentPolicy(tpm, session, selection);
    const rootSecret = await mixedRandom(tpm, session);
    const nvHalf = await mixedRandom(tpm, session);
    try {
      const sealed = await seal(tpm, session, srk, authPolicy, rootSecret);
      const index = await writeNvHalf(tpm, session, owner, authPolicy, nvHalf);
      const enrolment: RootTpmEnrolment = {
        format: 1,
        ...location,
        installation: Buffer.from(options.installation).toString('hex'),
        ...identity,
        srkHandle: options.srkHandle,
        srkName: srk.name.toString('hex'),
        srkCreatedByUs: created,
        pcrSelection: options.pcrSelection,
        policyDigest: authPolicy.toString('hex'),
        sealedPublic: sealed.publicArea.bytes.toString('base64'),
        sealedPrivate: sealed.privateArea.toString('base64'),
        nvHandle: index.handle,
        nvName: index.name.toString('hex'),
      };
      try {
        const rootKey = deriveRootKey(rootSecret, nvHalf, options.installation);
        await prove(tpm, enrolment, rootKey);
        return { enrolment, rootKey };
      } catch (error) {
        await removeNvHalf(tpm, session, owner, index.handle);
        throw error;
      }
    } finally {
      wipe(rootSecret, nvHalf);
    }
  });
}

/** PolicyPCR over the values of now, read in answers that nobody on the bus can change. */
async function currentPolicy(tpm: Tpm, session: Session, selection: PcrSelection): Promise<Buffer> {
  try {
    const values = await readPcrs(tpm, selection, [session]);
    return policyDigest([{ assert: 'pcr', selection, digest: pcrDigest(Alg.SHA256, values) }]);
  } catch (error) {
    if (!(error instanceof TpmError && (error.code === 'usage' || TpmError.is(error, Rc.HASH, Rc.VALUE)))) {
      throw error;
    }
    throw new ManagerError('tpm-unfit', `${error.message}; choose other PCRs with --pcrs`, { cause: error });
  }
}

async function seal(
  tpm: Tpm,
  session: Session,
  srk: ObjectEntity,
  authPolicy: Buffer,
  secret: Buffer,
): Promise<{ publicArea: PublicArea; privateArea: Buffer }> {
  const nothing = Buffer.alloc(0);
  try {
    const sealed = await tpm.run(
      Create,
      { parentHandle: withSession(srk, session) },
      {
        inSensitive: { userAuth: nothing, data: secret },
        inPublic: sealedTemplate(authPolicy),
        outsideInfo: nothing,
        creationPCR: [],
      },
    );
    const flaw = sealedFlaw(sealed.outPublic, authPolicy);
    if (flaw !== undefined) throw new ManagerError('tpm-fault', `the TPM sealed something else: ${flaw}`);
    return { publicArea: sealed.outPublic, privateArea: sealed.outPrivate };
  } catch (error) {
    if (!TpmError.is(error, Rc.AUTH_FAIL, Rc.BAD_AUTH)) throw error;
    throw unfit(srk.handle, 'it has a password', error);
  }
}

/** A key that cannot be released again must not be used: better to fail now than at the next start. */
async function prove(tpm: Tpm, enrolment: RootTpmEnrolment, rootKey: Buffer): Promise<void> {
  const released = await releaseRootKey(tpm, enrolment);
  try {
    if (released.length !== rootKey.length || !timingSafeEqual(released, rootKey)) {
      throw new ManagerError('tpm-fault', 'the TPM gave back another secret than it was given');
    }
  } catch (error) {
    wipe(rootKey);
    throw error;
  } finally {
    wipe(released);
  }
}
