import assert from 'node:assert/strict';
import { createHash, generateKeyPairSync, randomBytes } from 'node:crypto';
import {
  Alg,
  approvalMessage,
  commandHash,
  Eo,
  EvictControl,
  GetRandom,
  inSession,
  NvAttribute as N,
  NV_Increment,
  NV_Read,
  NV_Write,
  nameHash,
  nvEntity,
  ObjectChangeAuth,
  type ObjectEntity,
  PCR_Extend,
  PolicyAuthorize,
  PolicyGetDigest,
  PolicyNameHash,
  PolicyNV,
  PolicyOR,
  PolicyPassword,
  type PolicyStep,
  parsePcrSelection,
  pcrDigest,
  permanent,
  policyDigest,
  Rh,
  readPcrs,
  runPolicy,
  type Session,
  St,
  sealedTemplate,
  signInSoftware,
  softwareKeyPublic,
  srkTemplate,
  type Tpm,
  Unseal,
  withPassword,
  withSession,
} from 'tpm2-ts-bindings';
import { NOTHING, withPrimary, withSuiteTpm } from '../support/tpm-fixture.js';
import { create, has, OWNER, says, withChild, withNv } from './make.js';

const SIGNER = generateKeyPairSync('ec', { namedCurve: 'P-256' });
const SIGNER_PUBLIC = softwareKeyPublic(SIGNER.publicKey, { use: 'sign' });
const RSA = generateKeyPairSync('rsa', { modulusLength: 2048 });
const RSA_PUBLIC = softwareKeyPublic(RSA.publicKey, { use: 'sign' });
const SELECTION = parsePcrSelection('sha256:16,23');

function u32(value: number): Buffer {
  const out = Buffer.alloc(4);
  out.writeUInt32BE(value);
  return out;
}

describe('tpm2-ts-bindings: policies', () => {
  let tpm: Tpm;
  withSuiteTpm((made) => {
    tpm = made;
  });

  async function digestOnTpm(session: Session): Promise<Buffer> {
    return (await tpm.run(PolicyGetDigest, { policySession: session }, {})).policyDigest;
  }

  /** The digest is the same offline and on the TPM, in sessions of all kinds given. */
  async function sameDigest(
    steps: readonly PolicyStep[],
    kinds: readonly ('policy' | 'trial')[] = ['policy', 'trial'],
  ): Promise<void> {
    for (const authHash of [Alg.SHA256, Alg.SHA384]) {
      for (const kind of kinds) {
        await inSession(tpm, { kind, authHash }, async (session) => {
          await runPolicy(tpm, session, steps);
          assert.deepEqual(policyDigest(steps, authHash), await digestOnTpm(session), `${kind} ${authHash}`);
        });
      }
    }
  }

  /** Seals data to `policy` and opens it with `steps`; `fails` says that the TPM refuses. */
  async function opens(policy: readonly PolicyStep[], ...tries: readonly Try[]): Promise<void> {
    const data = randomBytes(20);
    const auth = Buffer.from('00ff00aa', 'hex');
    await withPrimary(tpm, srkTemplate(), async (srk) => {
      const sealed = await create(tpm, srk, sealedTemplate(policyDigest(policy)), { data, auth });
      await withChild(
        tpm,
        srk,
        sealed,
        async (item) => {
          for (const { steps = policy, fails, salted } of tries) {
            await inSession(
              tpm,
              salted ? { kind: 'policy', salt: srk, encrypt: 'out' } : { kind: 'policy' },
              async (session) => {
                const attempt = async () => {
                  await runPolicy(tpm, session, typeof steps === 'function' ? await steps(item) : steps);
                  const { outData } = await tpm.run(Unseal, { itemHandle: withSession(item, session) }, {});
                  assert.deepEqual(outData, data);
                };
                if (fails === undefined) await attempt();
                else await assert.rejects(attempt(), fails);
              },
            );
          }
        },
        auth,
      );
    });
  }
  interface Try {
    steps?: readonly PolicyStep[] | ((item: ObjectEntity) => Promise<readonly PolicyStep[]>);
    fails?: (error: unknown) => boolean;
    salted?: boolean;
  }

  it('PolicyPassword: the same digest as PolicyAuthValue, and the use carries the authValue', async () => {
    const password: PolicyStep = { assert: 'password' };
    await sameDigest([password]);
    assert.deepEqual(policyDigest([password]), policyDigest([{ assert: 'auth-value' }]));
    await opens(
      [password],
      {},
      { salted: true },
      { steps: [{ assert: 'auth-value' }] },
      // The last one counts.
      { steps: [password], salted: true },
    );
    await inSession(tpm, { kind: 'hmac' }, (session) =>
      assert.rejects(
        tpm.run(PolicyPassword, { policySession: session }, {}),
        says('AUTH_TYPE', 'VALUE', 'HANDLE'),
      ),
    );
  });

  it('PolicyLocality: locality 0 is where a socket is', async () => {
    const here: PolicyStep = { assert: 'locality', locality: 0b1 };
    const elsewhere: PolicyStep = { assert: 'locality', locality: 0b1000 };
    await sameDigest([here]);
    await sameDigest([{ assert: 'locality', locality: 33 }]);
    await opens([here], {});
    await opens([elsewhere], { fails: says('LOCALITY') });
    await inSession(tpm, { kind: 'policy' }, (session) =>
      assert.rejects(runPolicy(tpm, session, [here, elsewhere]), says('RANGE')),
    );
  });

  it('PolicyCounterTimer: the clock has run, and has not run for an age', async () => {
    const after = (clock: bigint): PolicyStep => {
      const operand = Buffer.alloc(8);
      operand.writeBigUInt64BE(clock);
      return { assert: 'counter-timer', operand, offset: 8, operation: Eo.UNSIGNED_GE };
    };
    await sameDigest([after(0n)]);
    await opens([after(0n)], {});
    await opens([after(1n << 62n)], { fails: says('POLICY') });
  });

  it('PolicyCpHash: one command with its parameters, no other', async () => {
    await withPrimary(tpm, srkTemplate(), async (srk) => {
      const cpHash = commandHash(GetRandom, {}, { bytesRequested: 4 });
      assert.deepEqual(
        cpHash,
        createHash('sha256').update(u32(0x17b)).update(Buffer.from('0004', 'hex')).digest(),
      );
      for (const kind of ['policy', 'trial'] as const) {
        await inSession(tpm, { kind }, async (session) => {
          await runPolicy(tpm, session, [{ assert: 'cp-hash', cpHash }]);
          assert.deepEqual(await digestOnTpm(session), policyDigest([{ assert: 'cp-hash', cpHash }]));
          await assert.rejects(
            tpm.run(PolicyNameHash, { policySession: session }, { nameHash: nameHash([srk]) }),
            says('CPHASH'),
          );
        });
      }
    });
    // PolicyAuthorize lets a policy name an object that has it: the signer approves after the object is made.
    const flexible: PolicyStep = { assert: 'authorize', signer: SIGNER_PUBLIC };
    const approve = (policy: readonly PolicyStep[]): PolicyStep[] => [
      {
        ...flexible,
        approved: {
          policy,
          signature: signInSoftware(SIGNER.privateKey, approvalMessage(policyDigest(policy))),
        },
      },
    ];
    await opens(
      [flexible],
      {
        steps: async (item) =>
          approve([{ assert: 'cp-hash', cpHash: commandHash(Unseal, { itemHandle: item }, {}) }]),
      },
      {
        steps: async (item) =>
          approve([
            {
              assert: 'cp-hash',
              cpHash: commandHash(
                ObjectChangeAuth,
                { objectHandle: item, parentHandle: item },
                { newAuth: NOTHING },
              ),
            },
          ]),
        fails: says('POLICY_FAIL'),
      },
      { steps: async (item) => approve([{ assert: 'name-hash', nameHash: nameHash([item]) }]) },
      {
        steps: async () => approve([{ assert: 'name-hash', nameHash: nameHash([OWNER]) }]),
        fails: says('POLICY_FAIL'),
      },
    );
  });

  it('PolicyNameHash: bound to the handles', async () => {
    const step: PolicyStep = { assert: 'name-hash', nameHash: nameHash([OWNER, permanent(Rh.LOCKOUT)]) };
    for (const kind of ['policy', 'trial'] as const) {
      await inSession(tpm, { kind }, async (session) => {
        await runPolicy(tpm, session, [step]);
        assert.deepEqual(await digestOnTpm(session), policyDigest([step]));
        await assert.rejects(runPolicy(tpm, session, [step, step]), says('CPHASH'));
      });
    }
    await assert.rejects(
      inSession(tpm, { kind: 'policy' }, (session) =>
        runPolicy(tpm, session, [{ assert: 'name-hash', nameHash: Buffer.alloc(3) }]),
      ),
      says('SIZE'),
    );
  });

  it('PolicyTemplate and PolicyDuplicationSelect fold as on the TPM', async () => {
    const templateHash = createHash('sha256').update(srkTemplate().bytes).digest();
    const newParentName = nameHash([OWNER]);
    const objectName = nameHash([permanent(Rh.LOCKOUT)]);
    const parent = Buffer.concat([Buffer.from('000b', 'hex'), newParentName]);
    const object = Buffer.concat([Buffer.from('000b', 'hex'), objectName]);
    for (const step of [
      { assert: 'template', templateHash },
      { assert: 'duplication-select', newParentName: parent, includeObject: false, objectName: object },
      { assert: 'duplication-select', newParentName: parent, includeObject: false },
      { assert: 'duplication-select', newParentName: parent, includeObject: true, objectName: object },
    ] as const) {
      for (const kind of ['policy', 'trial'] as const) {
        await inSession(tpm, { kind }, async (session) => {
          await runPolicy(tpm, session, [step]);
          assert.deepEqual(await digestOnTpm(session), policyDigest([step]), JSON.stringify(step));
          const other: PolicyStep =
            step.assert === 'template'
              ? { assert: 'template', templateHash: randomBytes(32) }
              : { assert: 'name-hash', nameHash: randomBytes(32) };
          await assert.rejects(runPolicy(tpm, session, [step, other]), says('CPHASH', 'VALUE'));
        });
      }
    }
    assert.throws(
      () => policyDigest([{ assert: 'duplication-select', newParentName: parent, includeObject: true }]),
      has('usage'),
    );
  });

  it('PolicySigned: by ECC and RSA keys, for one session only', async () => {
    for (const [signer, key] of [
      [SIGNER_PUBLIC, SIGNER],
      [RSA_PUBLIC, RSA],
    ] as const) {
      let old: ReturnType<typeof signInSoftware> | undefined;
      const sign = (message: Buffer) => {
        old ??= signInSoftware(key.privateKey, message);
        return signInSoftware(key.privateKey, message);
      };
      const signed: PolicyStep = { assert: 'signed', signer, sign, policyRef: Buffer.from('a reference') };
      await sameDigest([signed]);
      await opens(
        [signed],
        {},
        { steps: [{ ...signed, sign: () => old! }], fails: says('SIGNATURE') },
        { steps: [{ ...signed, policyRef: Buffer.from('another') }], fails: says('POLICY_FAIL') },
        { steps: [{ ...signed, cpHash: randomBytes(32) }], fails: says('POLICY_FAIL', 'CPHASH') },
        {
          steps: async (item) => [{ ...signed, cpHash: commandHash(Unseal, { itemHandle: item }, {}) }],
        },
      );
    }
  });

  it('PolicyTicket: what a signature or secret granted once satisfies again', async () => {
    const signed: PolicyStep = {
      assert: 'signed',
      signer: SIGNER_PUBLIC,
      sign: (message) => signInSoftware(SIGNER.privateKey, message),
      policyRef: Buffer.from('ref'),
      expiration: -3600,
    };
    const secret: PolicyStep = { assert: 'secret', of: withPassword(OWNER), expiration: -3600 };
    for (const step of [signed, secret]) {
      let again: PolicyStep[] = [];
      await inSession(tpm, { kind: 'policy' }, async (session) => {
        again = await runPolicy(tpm, session, [step]);
      });
      assert.equal(again[0]?.assert, 'ticket');
      const ticket = again[0] as PolicyStep<'ticket'>;
      assert.equal(ticket.ticket.tag, step === signed ? St.AUTH_SIGNED : St.AUTH_SECRET);
      assert.deepEqual(policyDigest(again), policyDigest([step]));
      await sameDigest(again, ['policy']);
      await opens(
        [step],
        { steps: again },
        {
          steps: [{ ...ticket, ticket: { ...ticket.ticket, digest: randomBytes(32) } }],
          fails: says('TICKET'),
        },
        { steps: [{ ...ticket, name: SIGNER_PUBLIC.bytes.subarray(0, 34) }], fails: says('TICKET', 'VALUE') },
      );
    }
    // Without a negative expiration there is no ticket, and the step comes back as it was.
    await inSession(tpm, { kind: 'policy' }, async (session) => {
      const once = { ...signed, expiration: 100 };
      assert.deepEqual(await runPolicy(tpm, session, [once]), [once]);
    });
  });

  it('PolicyAuthorize: what the key approved, and nothing else', async () => {
    for (const [signer, key] of [
      [SIGNER_PUBLIC, SIGNER],
      [RSA_PUBLIC, RSA],
    ] as const) {
      const policyRef = Buffer.from('release 1');
      const authorize: PolicyStep = { assert: 'authorize', signer, policyRef };
      const digest = pcrDigest(Alg.SHA256, await readPcrs(tpm, SELECTION));
      const policy: PolicyStep[] = [{ assert: 'pcr', selection: SELECTION, digest }];
      const approve = (steps: readonly PolicyStep[], ref: Buffer = policyRef): PolicyStep[] => [
        {
          ...authorize,
          approved: {
            policy: steps,
            signature: signInSoftware(key.privateKey, approvalMessage(policyDigest(steps), ref)),
          },
        },
        { assert: 'command-code', code: Unseal.code },
      ];
      const sealedTo: PolicyStep[] = [authorize, { assert: 'command-code', code: Unseal.code }];
      const approvedOne = approve(policy)[0] as PolicyStep<'authorize'>;
      await opens(
        sealedTo,
        { steps: approve(policy) },
        { steps: approve([{ assert: 'locality', locality: 1 }]) },
        { steps: approve(policy, Buffer.from('release 2')), fails: says('SIGNATURE') },
        // Approved for something else.
        {
          steps: [
            { ...approvedOne, approved: { ...approvedOne.approved!, policy: [{ assert: 'auth-value' }] } },
          ],
          fails: says('SIGNATURE'),
        },
        { steps: sealedTo, fails: has('usage') },
        // Registers other than the approved ones.
        {
          steps: async () => {
            await tpm.run(
              PCR_Extend,
              { pcrHandle: withPassword(permanent(16)) },
              { digests: [{ hashAlg: Alg.SHA256, digest: randomBytes(32) }] },
            );
            return approve(policy);
          },
          fails: says('SIGNATURE'),
        },
      );
    }
    await inSession(tpm, { kind: 'policy' }, (session) =>
      assert.rejects(
        tpm.run(
          PolicyAuthorize,
          { policySession: session },
          {
            approvedPolicy: Buffer.alloc(32),
            policyRef: NOTHING,
            keySign: Buffer.concat([Buffer.from('000b', 'hex'), randomBytes(32)]),
            checkTicket: { tag: St.VERIFIED, hierarchy: Rh.OWNER, digest: randomBytes(32) },
          },
        ),
        says('VALUE', 'TICKET'),
      ),
    );
  });

  it('PolicyOR: any number of branches, nested beyond eight', async () => {
    for (const count of [2, 8, 9, 17, 65]) {
      const branches = Array.from({ length: count }, (_, at): PolicyStep[] =>
        at === count - 1
          ? [{ assert: 'locality', locality: 1 }]
          : [{ assert: 'secret', of: withPassword(OWNER), policyRef: u32(at) }],
      );
      const choice = (take: number): PolicyStep => ({ assert: 'or', branches, take });
      const end: PolicyStep = { assert: 'command-code', code: Unseal.code };
      const start: PolicyStep = { assert: 'nv-written', written: true };
      const tries = [0, Math.floor(count / 2), count - 1];
      for (const take of tries) {
        await inSession(tpm, { kind: 'policy' }, async (session) => {
          const steps = [start, choice(take), end];
          await runPolicy(tpm, session, steps);
          assert.deepEqual(await digestOnTpm(session), policyDigest(steps), `${take} of ${count}`);
        });
      }
      await opens([choice(0), end], ...tries.map((take) => ({ steps: [choice(take), end] })), {
        steps: [{ assert: 'secret', of: withPassword(OWNER), policyRef: u32(0) }, end],
        fails: says('POLICY_FAIL'),
      });
      // A branch known by its digest alone has its place, and cannot be taken.
      const hidden = branches.map((branch, at) => (at === 0 ? policyDigest(branch) : branch));
      assert.deepEqual(policyDigest([{ assert: 'or', branches: hidden }]), policyDigest([choice(0)]));
      await opens(
        [choice(0)],
        { steps: [{ assert: 'or', branches: hidden, take: 1 }] },
        { steps: [{ assert: 'or', branches: hidden, take: 0 }], fails: has('usage') },
        { steps: [{ assert: 'or', branches }], fails: has('usage') },
      );
    }
    assert.throws(() => policyDigest([{ assert: 'or', branches: [[]] }]), has('usage'));
    await inSession(tpm, { kind: 'policy' }, (session) =>
      assert.rejects(
        tpm.run(PolicyOR, { policySession: session }, { pHashList: [randomBytes(32), randomBytes(32)] }),
        says('VALUE'),
      ),
    );
  });

  it('PolicyNV: a counter decides', async () => {
    await withNv(
      tpm,
      { attributes: N.OWNERWRITE | N.OWNERREAD | N.COUNTER | N.NO_DA, size: 8 },
      async (fresh, current) => {
        await tpm.run(NV_Increment, { authHandle: withPassword(OWNER), nvIndex: fresh }, {});
        const index = await current();
        const { data: operand } = await tpm.run(
          NV_Read,
          { authHandle: withPassword(OWNER), nvIndex: index },
          { size: 8, offset: 0 },
        );
        const nv: PolicyStep = { assert: 'nv', index, by: withPassword(OWNER), operand, operation: Eo.EQ };
        await sameDigest([nv]);
        await sameDigest([{ ...nv, operand: operand.subarray(4), offset: 4, operation: Eo.UNSIGNED_LE }]);
        await opens(
          [nv],
          {},
          {
            steps: async () => {
              await tpm.run(NV_Increment, { authHandle: withPassword(OWNER), nvIndex: index }, {});
              return [nv];
            },
            fails: says('POLICY'),
          },
        );
        await inSession(tpm, { kind: 'policy' }, (session) =>
          assert.rejects(
            tpm.run(
              PolicyNV,
              { authHandle: withPassword(OWNER), nvIndex: index, policySession: session },
              { operandB: Buffer.alloc(9), offset: 0, operation: Eo.EQ },
            ),
            says('SIZE', 'NV_RANGE'),
          ),
        );
      },
    );
  });

  it('PolicyNvWritten: once only', async () => {
    const unwritten: PolicyStep = { assert: 'nv-written', written: false };
    await sameDigest([unwritten]);
    await sameDigest([{ assert: 'nv-written', written: true }]);
    const policy = policyDigest([unwritten]);
    await withNv(
      tpm,
      { attributes: N.POLICYWRITE | N.OWNERREAD | N.NO_DA, size: 4, policy },
      async (fresh, current) => {
        const write = (index: typeof fresh) =>
          inSession(tpm, { kind: 'policy' }, async (session) => {
            await runPolicy(tpm, session, [unwritten]);
            await tpm.run(
              NV_Write,
              { authHandle: withSession(index, session), nvIndex: index },
              { data: Buffer.from('once'), offset: 0 },
            );
          });
        await write(nvEntity(fresh.nvPublic));
        await assert.rejects(write(await current()), says('POLICY_FAIL'));
      },
    );
  });

  it('steps that do not fit are refused by the TPM or here', async () => {
    assert.throws(() => policyDigest([{ assert: 'pcr', selection: SELECTION }]), has('usage'));
    await inSession(tpm, { kind: 'policy' }, (session) =>
      assert.rejects(
        runPolicy(tpm, session, [
          { assert: 'command-code', code: Unseal.code },
          { assert: 'command-code', code: EvictControl.code },
        ]),
        says('VALUE'),
      ),
    );
  });
});
