import { randomBytes } from 'node:crypto';
import {
  Alg,
  attestationKeyTemplate,
  Cap,
  ContextLoad,
  ContextSave,
  createTpm,
  ECDH_KeyGen,
  EventSequenceComplete,
  flush,
  GetCapability,
  GetTime,
  Hash,
  HashSequenceStart,
  inSession,
  LoadExternal,
  MakeCredential,
  NvAttribute as N,
  NV_Read,
  NV_Write,
  openSocket,
  PCR_Extend,
  PolicyGetDigest,
  PolicyPCR,
  PolicySecret,
  permanent,
  policyDigest,
  Quote,
  ReadClock,
  ReadPublic,
  Rh,
  readPcrs,
  readRandom,
  SelfTest,
  SequenceComplete,
  SequenceUpdate,
  sealedTemplate,
  sequenceEntity,
  srkTemplate,
  TestParms,
  type Tpm,
  withPassword,
} from 'tpm2-ts-bindings';
import { startSwtpm } from '../support/swtpm.js';
import { NOTHING, withPrimary } from '../support/tpm-fixture.js';
import { create, OWNER, withChild, withNv } from './make.js';

/** Answers of swtpm that report success, by command code. Those without sessions, or with passwords only. */
export async function recordAnswers(): Promise<ReadonlyMap<number, readonly Buffer[]>> {
  const answers = new Map<number, Buffer[]>();
  const swtpm = await startSwtpm();
  try {
    const socket = await openSocket(swtpm.socket);
    const tpm = createTpm({
      async transmit(command) {
        const code = Buffer.from(command).readUInt32BE(6);
        const answer = await socket.transmit(command);
        if (answer.readUInt32BE(6) === 0)
          answers.set(code, [...(answers.get(code) ?? []), Buffer.from(answer)]);
        return answer;
      },
      close: () => socket.close(),
    });
    await useMuch(tpm);
    await tpm.close();
  } finally {
    await swtpm.stop();
  }
  return answers;
}

async function useMuch(tpm: Tpm): Promise<void> {
  await tpm.run(SelfTest, {}, { fullTest: false });
  await tpm.run(ReadClock, {}, {});
  await readRandom(tpm, 16);
  for (const capability of Object.values(Cap)) {
    const property = capability === Cap.HANDLES ? 0x40000000 : capability === Cap.TPM_PROPERTIES ? 0x100 : 0;
    await tpm.run(GetCapability, {}, { capability, property, propertyCount: 20 });
  }
  await useRegistersAndHashes(tpm);
  await withNv(tpm, { attributes: N.OWNERWRITE | N.OWNERREAD | N.NO_DA, size: 8 }, async (index, current) => {
    const authHandle = withPassword(OWNER);
    await tpm.run(NV_Write, { authHandle, nvIndex: index }, { data: randomBytes(8), offset: 0 });
    await tpm.run(NV_Read, { authHandle, nvIndex: await current() }, { size: 8, offset: 0 });
  });
  await withPrimary(tpm, srkTemplate(), async (srk) => {
    const { type, parameters } = srk.publicArea.value;
    if (type === Alg.ECC) await tpm.run(TestParms, {}, { parameters: { type, parameters } });
    await tpm.run(ReadPublic, { objectHandle: srk }, {});
    await tpm.run(ECDH_KeyGen, { keyHandle: srk }, {});
    await tpm.run(MakeCredential, { handle: srk }, { credential: randomBytes(16), objectName: srk.name });
    const loaded = await tpm.run(
      LoadExternal,
      {},
      { inPrivate: undefined, inPublic: srk.publicArea, hierarchy: Rh.OWNER },
    );
    await flush(tpm, loaded.objectHandle);
    const { context } = await tpm.run(ContextSave, { saveHandle: srk }, {});
    await flush(tpm, (await tpm.run(ContextLoad, {}, { context })).loadedHandle);

    const sealed = sealedTemplate(policyDigest([{ assert: 'secret', of: withPassword(OWNER) }]));
    await withChild(tpm, srk, await create(tpm, srk, sealed, { data: randomBytes(16) }), () =>
      inSession(tpm, { kind: 'policy' }, async (session) => {
        await tpm.run(
          PolicySecret,
          { authHandle: withPassword(OWNER), policySession: session },
          { nonceTPM: NOTHING, cpHashA: NOTHING, policyRef: NOTHING, expiration: 0 },
        );
        await tpm.run(PolicyGetDigest, { policySession: session }, {});
        await tpm.run(
          PolicyPCR,
          { policySession: session },
          { pcrDigest: NOTHING, pcrs: [{ hash: Alg.SHA256, pcrs: [0] }] },
        );
      }),
    );
  });
  await withPrimary(tpm, attestationKeyTemplate(), async (key) => {
    const signHandle = withPassword(key);
    const signed = { qualifyingData: randomBytes(20), inScheme: { scheme: Alg.NULL } } as const;
    await tpm.run(Quote, { signHandle }, { ...signed, pcrSelect: [{ hash: Alg.SHA256, pcrs: [0, 7] }] });
    await tpm.run(
      GetTime,
      { privacyAdminHandle: withPassword(permanent(Rh.ENDORSEMENT)), signHandle },
      signed,
    );
  });
}

async function useRegistersAndHashes(tpm: Tpm): Promise<void> {
  const pcrHandle = withPassword(permanent(16));
  await readPcrs(tpm, [{ hash: Alg.SHA256, pcrs: [0, 1, 16] }]);
  await tpm.run(PCR_Extend, { pcrHandle }, { digests: [{ hashAlg: Alg.SHA256, digest: randomBytes(32) }] });
  const buffer = randomBytes(20);
  await tpm.run(Hash, {}, { data: buffer, hashAlg: Alg.SHA256, hierarchy: Rh.OWNER });
  const start = async (hashAlg: number) =>
    withPassword(
      sequenceEntity((await tpm.run(HashSequenceStart, {}, { auth: NOTHING, hashAlg })).sequenceHandle),
    );
  const sequenceHandle = await start(Alg.SHA256);
  await tpm.run(SequenceUpdate, { sequenceHandle }, { buffer });
  await tpm.run(SequenceComplete, { sequenceHandle }, { buffer, hierarchy: Rh.OWNER });
  await tpm.run(EventSequenceComplete, { pcrHandle, sequenceHandle: await start(Alg.NULL) }, { buffer });
}
