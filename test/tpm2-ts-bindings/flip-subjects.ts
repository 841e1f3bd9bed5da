import assert from 'node:assert/strict';
import {
  ObjectAttribute as A,
  Alg,
  CreatePrimary,
  embed,
  GetRandom,
  Load,
  NvAttribute as N,
  NV_DefineSpace,
  NV_Read,
  NV_Write,
  nvEntity,
  type ObjectEntity,
  PolicyAuthValue,
  type PublicArea,
  policyDigest,
  publicArea,
  Quote,
  ReadPublic,
  readNvIndex,
  readRandom,
  type Session,
  type SessionOptions,
  type Tpm,
  tpmsNvPublic,
  Unseal,
  withPassword,
  withSession,
} from 'tpm2-ts-bindings';
import { NOTHING } from '../support/tpm-fixture.js';
import { create, OWNER } from './make.js';

/** What the bit flips are tried on. */

export const AUTH = Buffer.from('the same for all of them');

export interface Subject {
  readonly name: string;
  readonly code: number;
  /** Handles in the answer, which no HMAC covers. */
  readonly handles: number;
  readonly session: SessionOptions;
  run(session: Session): Promise<unknown>;
}

/** What the subjects are about. */
export interface Place {
  readonly tpm: Tpm;
  readonly srk: ObjectEntity;
  readonly sealed: ObjectEntity;
  readonly data: Buffer;
}

/** What is used with a session. @param on whose `tpm` may be another one later */
export async function makeSubjects(
  on: Place,
  byPolicy: ObjectEntity,
  signer: ObjectEntity,
): Promise<Subject[]> {
  const { tpm, srk, sealed } = on;
  const encrypted = { kind: 'hmac', encrypt: 'both', salt: srk } as const;
  const publicInfo = embed(tpmsNvPublic, {
    nvIndex: 0x01820000,
    nameAlg: Alg.SHA256,
    attributes: N.OWNERWRITE | N.OWNERREAD | N.NO_DA,
    authPolicy: NOTHING,
    dataSize: 32,
  });
  const owner = withPassword(OWNER);
  await tpm.run(NV_DefineSpace, { authHandle: owner }, { auth: NOTHING, publicInfo });
  await tpm.run(NV_Write, { authHandle: owner, nvIndex: nvEntity(publicInfo) }, { data: on.data, offset: 0 });
  const nvIndex = await readNvIndex(tpm, publicInfo.value.nvIndex);
  assert.ok(nvIndex);
  const child = await create(tpm, srk, dataTemplate(false), { auth: AUTH, data: on.data });
  return [
    {
      name: 'GetRandom, encrypted',
      code: GetRandom.code,
      handles: 0,
      session: encrypted,
      run: (session) => readRandom(on.tpm, 16, [session]),
    },
    {
      name: 'ReadPublic, audited',
      code: ReadPublic.code,
      handles: 0,
      session: { kind: 'hmac', salt: srk },
      run: (session) => on.tpm.run(ReadPublic, { objectHandle: sealed }, {}, [session]),
    },
    {
      name: 'Unseal, encrypted',
      code: Unseal.code,
      handles: 0,
      session: encrypted,
      run: (session) => on.tpm.run(Unseal, { itemHandle: withSession(sealed, session) }, {}),
    },
    {
      name: 'Unseal, neither salted nor bound',
      code: Unseal.code,
      handles: 0,
      session: { kind: 'hmac' },
      run: (session) => on.tpm.run(Unseal, { itemHandle: withSession(sealed, session) }, {}),
    },
    {
      name: 'Unseal, by policy',
      code: Unseal.code,
      handles: 0,
      session: { ...encrypted, kind: 'policy' },
      run: async (session) => {
        await on.tpm.run(PolicyAuthValue, { policySession: session }, {});
        return on.tpm.run(Unseal, { itemHandle: withSession(byPolicy, session) }, {});
      },
    },
    {
      name: 'NV_Read, encrypted',
      code: NV_Read.code,
      handles: 0,
      session: encrypted,
      run: (session) =>
        on.tpm.run(NV_Read, { authHandle: withSession(OWNER, session), nvIndex }, { size: 32, offset: 0 }),
    },
    {
      name: 'Quote',
      code: Quote.code,
      handles: 0,
      session: { kind: 'hmac', bind: signer },
      run: (session) =>
        on.tpm.run(
          Quote,
          { signHandle: withSession(signer, session) },
          {
            qualifyingData: NOTHING,
            inScheme: { scheme: Alg.NULL },
            pcrSelect: [{ hash: Alg.SHA256, pcrs: [0] }],
          },
        ),
    },
    {
      name: 'CreatePrimary, encrypted',
      code: CreatePrimary.code,
      handles: 1,
      session: encrypted,
      run: (session) => createSealedPrimary(on.tpm, session, on.data),
    },
    {
      name: 'Load',
      code: Load.code,
      handles: 1,
      session: { kind: 'hmac', salt: srk },
      run: (session) =>
        on.tpm.run(
          Load,
          { parentHandle: withSession(srk, session) },
          { inPrivate: child.outPrivate, inPublic: child.outPublic },
        ),
    },
  ];
}

/** A primary object that holds `data`. */
export function createSealedPrimary(tpm: Tpm, session: Session, data: Buffer) {
  return tpm.run(
    CreatePrimary,
    { primaryHandle: withSession(OWNER, session) },
    {
      inSensitive: { userAuth: AUTH, data },
      inPublic: dataTemplate(false),
      outsideInfo: NOTHING,
      creationPCR: [],
    },
  );
}

/** Data that its authValue opens; with `policy` through PolicyAuthValue instead. */
export function dataTemplate(policy: boolean): PublicArea {
  return publicArea({
    type: Alg.KEYEDHASH,
    nameAlg: Alg.SHA256,
    objectAttributes: A.fixedTPM | A.fixedParent | A.noDA | (policy ? 0 : A.userWithAuth),
    authPolicy: policy ? policyDigest([{ assert: 'auth-value' }]) : NOTHING,
    parameters: { scheme: { scheme: Alg.NULL } },
    unique: NOTHING,
  });
}
