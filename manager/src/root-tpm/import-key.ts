import { randomBytes } from 'node:crypto';
import {
  agreementKeyTemplate,
  Certify,
  ContextLoad,
  ContextSave,
  createPrimary,
  decode,
  ECDH_ZGen,
  flush,
  inSession,
  type ObjectEntity,
  objectEntity,
  type PublicArea,
  parsePcrSelection,
  permanent,
  publicKeyObject,
  Rc,
  Rh,
  runPolicy,
  type SavedContext,
  type Tpm,
  TpmError,
  tpmsEccPoint,
  whileLoaded,
  wipe,
  withPassword,
  withSession,
} from 'tpm2-ts-bindings';
import { ManagerError } from '../error.js';
import { attesting } from './attestation-key.js';
import type { RootTpmEnrolment } from './enrolment.js';
import { fixedPolicy } from './generation.js';
import { importSecret } from './import-secret.js';
import { readPcrState } from './platform-state.js';
import { checkQualifying, OWN_SCHEME, statement } from './quote.js';
import { enrolledSrk } from './srk.js';

/**
 * A key of the chip that one secret is sent to. It takes up no room in the chip between its making and its use, and no
 * reset of the chip leaves it.
 */
export interface ImportKey {
  /** TPMT_PUBLIC. Its policy is the values that the selected registers had when it was made. */
  readonly publicArea: Buffer;
  readonly pcrSelection: string;
  /** TPM2_Certify by the attestation key. */
  readonly certifyInfo: Buffer;
  readonly certifySignature: Buffer;
  /**
   * The secret that whoever made the point shares with this chip, 32 bytes; the caller wipes it. Once: whatever comes of
   * it, the key is gone then, unless it is `bad-request`.
   * @param point TPMS_ECC_POINT
   * @throws ManagerError `import-key-lost` where it was used or dropped, or the TPM was reset; `platform-policy` where a
   * register has another value than when the key was made; `bad-request` for what is no point
   */
  unwrap(point: Uint8Array): Promise<Buffer>;
  /** The key is of no use any more. Can be repeated. */
  drop(): Promise<void>;
}

/** Runs with the TPM, one after the other. */
export type InTurn = <T>(body: (tpm: Tpm) => Promise<T>) => Promise<T>;

/** A PCR may move between policy and use without being one of the selected: then once more. */
const POLICY_ATTEMPTS = 5;

interface Made {
  readonly area: PublicArea;
  readonly context: SavedContext;
  readonly certifyInfo: Buffer;
  readonly certifySignature: Buffer;
}

export async function makeImportKey(
  inTurn: InTurn,
  enrolment: RootTpmEnrolment,
  blob: Uint8Array,
  pcrSelection: string,
  qualifying: Uint8Array,
): Promise<ImportKey> {
  const made = await inTurn((tpm) => make(tpm, enrolment, blob, pcrSelection, qualifying));
  return new SavedImportKey(inTurn, enrolment, pcrSelection, made);
}

class SavedImportKey implements ImportKey {
  readonly publicArea: Buffer;
  readonly certifyInfo: Buffer;
  readonly certifySignature: Buffer;
  readonly #area: PublicArea;
  #context: SavedContext | undefined;

  constructor(
    private readonly inTurn: InTurn,
    private readonly enrolment: RootTpmEnrolment,
    readonly pcrSelection: string,
    made: Made,
  ) {
    this.publicArea = made.area.bytes;
    this.certifyInfo = made.certifyInfo;
    this.certifySignature = made.certifySignature;
    this.#area = made.area;
    this.#context = made.context;
  }

  async unwrap(point: Uint8Array): Promise<Buffer> {
    const inPoint = readPoint(point);
    const context = this.#context;
    // Before the TPM is asked: no second use, also of one that is under way.
    this.#context = undefined;
    if (context === undefined) throw lost('it was used or dropped already');
    return this.inTurn(async (tpm) => {
      const key = await load(tpm, context, this.#area);
      try {
        const z = await agree(tpm, this.enrolment, key, this.pcrSelection, inPoint);
        try {
          return importSecret(z, point, key.name);
        } finally {
          wipe(z);
        }
      } finally {
        await flush(tpm, key.handle);
      }
    });
  }

  async drop(): Promise<void> {
    this.#context = undefined;
  }
}

function make(
  tpm: Tpm,
  enrolment: RootTpmEnrolment,
  blob: Uint8Array,
  pcrSelection: string,
  qualifying: Uint8Array,
): Promise<Made> {
  const qualifyingData = checkQualifying(qualifying);
  return attesting(tpm, enrolment, blob, async ({ session, key: signer }) => {
    const policy = fixedPolicy(pcrSelection, await readPcrState(tpm, pcrSelection, session));
    const template = agreementKeyTemplate(policy, { x: randomBytes(32), y: randomBytes(32) });
    const hierarchy = withSession(permanent(Rh.NULL), session);
    return whileLoaded(tpm, createPrimary(tpm, template, { hierarchy }), async (key) => {
      // ADMIN role: without adminWithPolicy the empty authValue is enough, and can do nothing else.
      const { certifyInfo, signature } = await tpm.run(
        Certify,
        { objectHandle: withPassword(key), signHandle: withSession(signer, session) },
        { qualifyingData, inScheme: OWN_SCHEME },
      );
      const { context } = await tpm.run(ContextSave, { saveHandle: key }, {});
      const certified = statement(certifyInfo, signature);
      return {
        area: key.publicArea,
        context,
        certifyInfo: certified.attest,
        certifySignature: certified.signature,
      };
    });
  });
}

async function load(tpm: Tpm, context: SavedContext, area: PublicArea): Promise<ObjectEntity> {
  try {
    return objectEntity((await tpm.run(ContextLoad, {}, { context })).loadedHandle, area);
  } catch (error) {
    if (!TpmError.is(error, Rc.INTEGRITY, Rc.HIERARCHY, Rc.HANDLE, Rc.SIZE)) throw error;
    throw lost('the TPM was reset since it was made, or is another one', error);
  }
}

/** @returns the x coordinate of what the key and the point give */
async function agree(
  tpm: Tpm,
  enrolment: RootTpmEnrolment,
  key: ObjectEntity,
  pcrSelection: string,
  inPoint: { readonly x: Buffer; readonly y: Buffer },
): Promise<Buffer> {
  const srk = await enrolledSrk(tpm, enrolment);
  const steps = [{ assert: 'pcr', selection: parsePcrSelection(pcrSelection) }] as const;
  return inSession(tpm, { kind: 'policy', encrypt: 'both', salt: srk }, async (session) => {
    for (let attempt = 1; ; attempt++) {
      try {
        await runPolicy(tpm, session, steps);
        const { outPoint } = await tpm.run(ECDH_ZGen, { keyHandle: withSession(key, session) }, { inPoint });
        wipe(outPoint.y);
        return outPoint.x;
      } catch (error) {
        if (TpmError.is(error, Rc.PCR_CHANGED) && attempt < POLICY_ATTEMPTS) continue;
        if (!TpmError.is(error, Rc.POLICY_FAIL, Rc.PCR_CHANGED)) throw error;
        throw new ManagerError(
          'platform-policy',
          `a register of ${pcrSelection} has another value than when the key for the secret was made: the platform ` +
            'changed while a vTPM was on its way here. Begin the migration again',
          { cause: error },
        );
      }
    }
  });
}

function readPoint(bytes: Uint8Array): { readonly x: Buffer; readonly y: Buffer } {
  try {
    const point = decode(tpmsEccPoint, bytes, 'point');
    // node:crypto takes no point that is not on the curve.
    publicKeyObject(agreementKeyTemplate(Buffer.alloc(0), point).value);
    return point;
  } catch (cause) {
    throw new ManagerError('bad-request', 'what was sent for the import key is no point of P-256', { cause });
  }
}

function lost(why: string, cause?: unknown): ManagerError {
  return new ManagerError(
    'import-key-lost',
    `the key that the secret was sent to is not there any more: ${why}. Begin the migration again`,
    { cause },
  );
}
