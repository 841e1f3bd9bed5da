import assert from 'node:assert/strict';
import {
  Alg,
  attestationKeyTemplate,
  Cap,
  type Command,
  createChild,
  EvictControl,
  FlushContext,
  GetCapability,
  GetCommandAuditDigest,
  GetRandom,
  type HandleArguments,
  type HandleNames,
  HashSequenceStart,
  inSession,
  NvAttribute as N,
  NV_DefineSpace,
  NV_UndefineSpace,
  openSession,
  PCR_Extend,
  PCR_Read,
  PolicyAuthValue,
  PolicyCpHash,
  PolicyDuplicationSelect,
  PolicyGetDigest,
  PolicyNvWritten,
  PolicyPCR,
  PolicyRestart,
  PolicySecret,
  permanent,
  Quote,
  type Rc,
  Rh,
  SelfTest,
  SequenceComplete,
  SetCommandCodeAuditStatus,
  Shutdown,
  Sign,
  St,
  StartAuthSession,
  Startup,
  Su,
  sequenceEntity,
  srkTemplate,
  type Tpm,
  unnamed,
  withPassword,
} from 'tpm2-ts-bindings';
import { NOTHING, withPrimary, withSuiteTpm } from '../support/tpm-fixture.js';
import { OWNER, says, withNv } from './make.js';

const ENDORSEMENT = permanent(Rh.ENDORSEMENT);
const NO_SUCH_ALGORITHM = 0x7ffe;
const DIGEST = Buffer.alloc(32, 1);

/** What no other test has swtpm refuse. `every-command.test.ts` says whether that is all. */
describe('tpm2-ts-bindings: commands that the TPM refuses', () => {
  let tpm: Tpm;
  withSuiteTpm((own) => {
    tpm = own;
  });

  const refused = <H extends HandleNames, P>(
    code: keyof typeof Rc,
    command: Command<H, P, unknown>,
    handles: HandleArguments<H>,
    params: P,
  ): Promise<void> => assert.rejects(tpm.run(command, handles, params), says(code), command.name);

  it('start-up, shut-down and capabilities that there are not', async () => {
    await refused('INITIALIZE', Startup, {}, { startupType: Su.CLEAR });
    await refused('VALUE', Shutdown, {}, { shutdownType: 7 });
    await refused('VALUE', GetCapability, {}, { capability: Cap.ALGS + 0x70, property: 0, propertyCount: 1 });
  });

  it('a session that the TPM has forgotten', async () => {
    const session = await openSession(tpm, { kind: 'hmac' });
    await tpm.run(FlushContext, {}, { flushHandle: session.handle });
    await refused('HANDLE', FlushContext, {}, { flushHandle: session.handle });
    await assert.rejects(tpm.run(SelfTest, {}, { fullTest: false }, [session]), says('REFERENCE_S0'));
    await assert.rejects(tpm.run(GetRandom, {}, { bytesRequested: 8 }, [session]), says('REFERENCE_S0'));
    await session.close();
  });

  it('a session with a nonce that is too short', async () => {
    const nothing = { encryptedSalt: NOTHING, symmetric: { algorithm: Alg.NULL } } as const;
    const handles = { tpmKey: permanent(Rh.NULL), bind: permanent(Rh.NULL) };
    const params = { ...nothing, nonceCaller: Buffer.alloc(4), sessionType: 0, authHash: Alg.SHA256 };
    await refused('SIZE', StartAuthSession, handles, params);
  });

  it('policy commands on what is no policy session', async () => {
    await inSession(tpm, { kind: 'hmac' }, async (policySession) => {
      await refused('VALUE', PolicyAuthValue, { policySession }, {});
      await refused('VALUE', PolicyGetDigest, { policySession }, {});
      await refused('VALUE', PolicyRestart, { policySession }, {});
    });
  });

  it('a policy that asks for an authValue, with another one', async () => {
    await inSession(tpm, { kind: 'policy' }, async (policySession) => {
      const authHandle = withPassword(permanent(Rh.OWNER, Buffer.from('another')));
      const secret = { nonceTPM: NOTHING, cpHashA: NOTHING, policyRef: NOTHING, expiration: 0 };
      await refused('BAD_AUTH', PolicySecret, { authHandle, policySession }, secret);
    });
  });

  it('assertions that contradict what the session says already', async () => {
    await inSession(tpm, { kind: 'policy' }, async (policySession) => {
      const pcrs = [{ hash: Alg.SHA256, pcrs: [16] }];
      await refused('VALUE', PolicyPCR, { policySession }, { pcrDigest: DIGEST, pcrs });
      await tpm.run(PolicyCpHash, { policySession }, { cpHashA: DIGEST });
      await refused('CPHASH', PolicyCpHash, { policySession }, { cpHashA: Buffer.alloc(32, 2) });
      const names = { objectName: NOTHING, newParentName: Buffer.from(`000b${'01'.repeat(32)}`, 'hex') };
      const select = { ...names, includeObject: false };
      await refused('CPHASH', PolicyDuplicationSelect, { policySession }, select);
      await tpm.run(PolicyNvWritten, { policySession }, { writtenSet: true });
      await refused('VALUE', PolicyNvWritten, { policySession }, { writtenSet: false });
    });
  });

  it('registers and hashes', async () => {
    const digests = [{ hashAlg: Alg.SHA256, digest: DIGEST }];
    await refused('LOCALITY', PCR_Extend, { pcrHandle: withPassword(permanent(17)) }, { digests });
    await refused('HASH', PCR_Read, {}, { pcrSelectionIn: [{ hash: NO_SUCH_ALGORITHM, pcrs: [0] }] });
    await refused('HASH', HashSequenceStart, {}, { auth: NOTHING, hashAlg: NO_SUCH_ALGORITHM });

    const auth = Buffer.from('of the sequence');
    const { sequenceHandle } = await tpm.run(HashSequenceStart, {}, { auth, hashAlg: Alg.SHA256 });
    const complete = { buffer: NOTHING, hierarchy: Rh.OWNER };
    const wrong = withPassword(sequenceEntity(sequenceHandle, Buffer.from('another')));
    await refused('BAD_AUTH', SequenceComplete, { sequenceHandle: wrong }, complete);
    await tpm.run(FlushContext, {}, { flushHandle: sequenceHandle });
  });

  it('handles that are not for the command', async () => {
    await withPrimary(tpm, srkTemplate(), async (srk) => {
      const signed = { qualifyingData: NOTHING, inScheme: { scheme: Alg.NULL } } as const;
      await refused('KEY', Quote, { signHandle: withPassword(srk) }, { ...signed, pcrSelect: [] });
      const digest = { privacyHandle: withPassword(OWNER), signHandle: withPassword(srk) };
      await refused('VALUE', GetCommandAuditDigest, digest, signed);
      const evict = { auth: withPassword(OWNER), objectHandle: srk };
      await refused('RANGE', EvictControl, evict, { persistentHandle: 0x81800000 });
      const validation = { tag: St.HASHCHECK, hierarchy: Rh.NULL, digest: NOTHING };
      const sign = { digest: DIGEST, inScheme: { scheme: Alg.NULL }, validation } as const;
      await refused('KEY', Sign, { keyHandle: withPassword(srk) }, sign);
    });
    await withPrimary(tpm, attestationKeyTemplate(), async (key) => {
      await assert.rejects(createChild(tpm, withPassword(key), srkTemplate()), says('TYPE'));
    });
    const none = { auditAlg: Alg.NULL, setList: [], clearList: [] };
    await refused('VALUE', SetCommandCodeAuditStatus, { auth: withPassword(ENDORSEMENT) }, none);
  });

  it('an NV index that is there, and one that is not', async () => {
    await withNv(tpm, { attributes: N.OWNERWRITE | N.OWNERREAD, size: 8 }, async (index) => {
      const space = { auth: NOTHING, publicInfo: index.nvPublic };
      await refused('NV_DEFINED', NV_DefineSpace, { authHandle: withPassword(OWNER) }, space);
    });
    const gone = { authHandle: withPassword(OWNER), nvIndex: unnamed(0x01820001) };
    await refused('HANDLE', NV_UndefineSpace, gone, {});
  });
});
