import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import {
  ActivateCredential,
  Alg,
  type Authorized,
  attestationKeyTemplate,
  Create,
  type Encryption,
  type Entity,
  GetRandom,
  HierarchyChangeAuth,
  inSession,
  makeCredential,
  NV_Read,
  NV_Write,
  NvAttribute,
  type ObjectEntity,
  openSession,
  permanent,
  Rh,
  rsaSrkTemplate,
  runPolicy,
  type Session,
  type SessionOptions,
  srkTemplate,
  type Tpm,
  Unseal,
  withPassword,
  withSession,
} from 'tpm2-ts-bindings';
import { type RecordingProxy, startRecordingProxy } from '../support/recording-proxy.js';
import { type Swtpm, startSwtpm } from '../support/swtpm.js';
import { assertNothingLeaked, connectTpm, NOTHING, withPrimary } from '../support/tpm-fixture.js';
import { create, dataTemplate, OWNER, withChild, withNv } from './make.js';

const HASHES = [Alg.SHA1, Alg.SHA256, Alg.SHA384] as const;
const ENCRYPTIONS = ['in', 'out', 'both'] as const;

/** Every combination that type-checks. */
function combinations(
  kind: 'hmac' | 'policy',
  salt: ObjectEntity,
  bind: Entity,
  hashes: readonly number[] = HASHES,
): SessionOptions[] {
  return hashes.flatMap((authHash) => {
    const plain = { kind, authHash };
    return [
      plain,
      { ...plain, salt },
      { ...plain, bind },
      { ...plain, salt, bind },
      ...ENCRYPTIONS.flatMap((encrypt) => [
        { ...plain, encrypt, salt },
        { ...plain, encrypt, bind },
        { ...plain, encrypt, salt, bind },
      ]),
    ];
  });
}

const named = ({ salt, bind, authHash, encrypt }: SessionOptions) =>
  `hash ${authHash} encrypt ${encrypt} ${salt ? 'salted' : ''} ${bind ? 'bound' : ''}`;
const hides = (way: Encryption, ...options: readonly { readonly encrypt?: Encryption }[]) =>
  options.some(({ encrypt }) => encrypt === way || encrypt === 'both');

describe('tpm2-ts-bindings: kinds of sessions', () => {
  let swtpm: Swtpm;
  let bus: RecordingProxy;
  let tpm: Tpm;
  before(async () => {
    swtpm = await startSwtpm();
    bus = await startRecordingProxy(swtpm.socket);
    tpm = await connectTpm(bus.path);
  });
  after(async () => {
    await assertNothingLeaked(tpm);
    await tpm.close();
    await bus.close();
    await swtpm.stop();
  });

  /** Seals `data` with the parent authorised so. */
  const seal = (parentHandle: Authorized, data: Buffer, sessions: readonly Session[] = []) =>
    tpm.run(
      Create,
      { parentHandle },
      {
        inSensitive: { userAuth: NOTHING, data },
        inPublic: dataTemplate(),
        outsideInfo: NOTHING,
        creationPCR: [],
      },
      sessions,
    );

  for (const [srkKind, template] of [
    ['ECC P-256', srkTemplate()],
    ['RSA 2048', rsaSrkTemplate()],
  ] as const) {
    it(`salt, binding, encryption and hash in every combination, SRK of ${srkKind}`, async () => {
      const auth = Buffer.concat([randomBytes(8), Buffer.of(0), randomBytes(8)]);
      const data = randomBytes(40);
      await withPrimary(
        tpm,
        template,
        async (srk) => {
          const inner = await create(tpm, srk, dataTemplate(), { data, auth });
          await withChild(
            tpm,
            srk,
            inner,
            async (sealed) => {
              for (const bind of [srk, sealed]) {
                for (const options of combinations('hmac', srk, bind)) {
                  await inSession(tpm, options, async (session) => {
                    // Two entities with one session, only one of which it can be bound to, and nonces that roll.
                    for (let time = 0; time < 2; time++) {
                      const fresh = randomBytes(32);
                      bus.forget();
                      const { outPrivate } = await seal(withSession(srk, session), fresh);
                      assert.equal(bus.sent().includes(fresh), !hides('in', options), named(options));
                      assert.equal(
                        bus.received().includes(outPrivate),
                        !hides('out', options),
                        named(options),
                      );
                      const itemHandle = withSession(sealed, session);
                      assert.deepEqual((await tpm.run(Unseal, { itemHandle }, {})).outData, data);
                      assert.equal(bus.received().includes(data), !hides('out', options), named(options));
                    }
                  });
                }
              }
            },
            auth,
          );
        },
        randomBytes(20),
      );
    });
  }

  it('policy sessions of each hash, for objects named with it', async () => {
    const auth = randomBytes(15);
    const data = randomBytes(40);
    await withPrimary(tpm, srkTemplate(), async (srk) => {
      for (const nameAlg of HASHES) {
        const made = await create(tpm, srk, dataTemplate({ policy: true, nameAlg }), { data, auth });
        const use = async (sealed: ObjectEntity) => {
          for (const options of combinations('policy', srk, sealed, [nameAlg])) {
            await inSession(tpm, options, async (session) => {
              for (let time = 0; time < 2; time++) {
                bus.forget();
                await runPolicy(tpm, session, [{ assert: 'auth-value' }]);
                const { outData } = await tpm.run(Unseal, { itemHandle: withSession(sealed, session) }, {});
                assert.deepEqual(outData, data);
                assert.equal(bus.received().includes(data), !hides('out', options), named(options));
              }
            });
          }
        };
        await withChild(tpm, srk, made, use, auth);
      }
    });
  });

  it('two and three sessions on one command, of any hash, authorising or not', async () => {
    interface Part {
      readonly authHash: number;
      readonly encrypt?: Encryption;
      readonly audit?: true;
    }
    const authorised: Part[][] = [];
    /** Beside a password. */
    const further: Part[][] = [];
    HASHES.forEach((one, at) => {
      const [two, three] = [HASHES[(at + 1) % 3] ?? one, HASHES[(at + 2) % 3] ?? one];
      for (const encrypt of ENCRYPTIONS) {
        authorised.push(
          [{ authHash: one }, { authHash: two, encrypt }],
          [
            { authHash: one, encrypt },
            { authHash: two, audit: true },
          ],
          [{ authHash: one }, { authHash: two, encrypt }, { authHash: three }],
          [
            { authHash: one, audit: true },
            { authHash: two, encrypt },
          ],
        );
        further.push(
          [{ authHash: one, encrypt }, { authHash: two }],
          [
            { authHash: one, audit: true },
            { authHash: two, encrypt },
          ],
        );
      }
      const apart: Part[] = [
        { authHash: one, encrypt: 'in' },
        { authHash: two, encrypt: 'out' },
      ];
      for (const parts of [apart, apart.toReversed()]) {
        authorised.push(parts, [{ authHash: three }, ...parts], [{ authHash: three, audit: true }, ...parts]);
        further.push(parts);
      }
    });

    await withPrimary(
      tpm,
      srkTemplate(),
      async (srk) => {
        const open = ({ encrypt, ...part }: Part) => {
          const plain = { kind: 'hmac', ...part } as const;
          return openSession(tpm, encrypt === undefined ? plain : { ...plain, encrypt, salt: srk });
        };
        for (const [sets, isAuthorised] of [
          [authorised, true],
          [further, false],
        ] as const) {
          for (const set of sets) {
            const sessions: Session[] = [];
            for (const part of set) sessions.push(await open(part));
            const [first, ...others] = sessions;
            assert.ok(first);
            for (let time = 0; time < 2; time++) {
              const fresh = randomBytes(32);
              bus.forget();
              const made: { readonly outPrivate: Buffer } = await (isAuthorised
                ? seal(withSession(srk, first), fresh, others)
                : seal(withPassword(srk), fresh, sessions));
              assert.equal(bus.sent().includes(fresh), !hides('in', ...set), JSON.stringify(set));
              assert.equal(
                bus.received().includes(made.outPrivate),
                !hides('out', ...set),
                JSON.stringify(set),
              );
            }
            for (const session of sessions) await session.close();
          }
        }
      },
      randomBytes(16),
    );
  });

  it('what a salted, encrypting session carries is in no byte of the bus; without encryption it is', async () => {
    const auth = randomBytes(20);
    const attributes = NvAttribute.AUTHREAD | NvAttribute.AUTHWRITE | NvAttribute.NO_DA;
    /** @returns the secret that was sent or came. Authorised as `by` says, with `more` sessions. */
    type Secret = (by: (entity: Entity) => Authorized, more: readonly Session[]) => Promise<Buffer>;
    await withPrimary(tpm, srkTemplate(), (srk) =>
      withPrimary(tpm, attestationKeyTemplate(), (ak) =>
        withNv(tpm, { attributes, size: 32, auth }, async (_, current) => {
          const sealedData = randomBytes(32);
          const sealed = await create(tpm, srk, dataTemplate(), { data: sealedData, auth });
          const commands: Record<string, Secret> = {
            async Create(by, more) {
              const data = randomBytes(32);
              await seal(by(srk), data, more);
              return data;
            },
            async Unseal(by, more) {
              const unseal = async (item: ObjectEntity) =>
                (await tpm.run(Unseal, { itemHandle: by(item) }, {}, more)).outData;
              assert.deepEqual(await withChild(tpm, srk, sealed, unseal, auth), sealedData);
              return sealedData;
            },
            async NV_Write(by, more) {
              const data = randomBytes(32);
              const nvIndex = await current();
              await tpm.run(NV_Write, { authHandle: by(nvIndex), nvIndex }, { data, offset: 0 }, more);
              return data;
            },
            async NV_Read(by, more) {
              const nvIndex = await current();
              const read = { size: 32, offset: 0 };
              return (await tpm.run(NV_Read, { authHandle: by(nvIndex), nvIndex }, read, more)).data;
            },
            async ActivateCredential(by, more) {
              const credential = randomBytes(32);
              const blob = makeCredential(srk.publicArea.value, ak.name, credential);
              const handles = { activateHandle: by(ak), keyHandle: withPassword(srk) };
              const { certInfo } = await tpm.run(ActivateCredential, handles, blob, more);
              assert.deepEqual(certInfo, credential);
              return credential;
            },
            async HierarchyChangeAuth(by, more) {
              const newAuth = randomBytes(32);
              await tpm.run(HierarchyChangeAuth, { authHandle: by(OWNER) }, { newAuth }, more);
              const owner = permanent(Rh.OWNER, newAuth);
              await inSession(tpm, { kind: 'hmac' }, (session) => {
                const authHandle = withSession(owner, session);
                return tpm.run(HierarchyChangeAuth, { authHandle }, { newAuth: NOTHING });
              });
              return newAuth;
            },
            async GetRandom(_by, more) {
              return (await tpm.run(GetRandom, {}, { bytesRequested: 32 }, more)).randomBytes;
            },
          };
          for (const [name, command] of Object.entries(commands)) {
            for (const place of name === 'GetRandom'
              ? (['beside'] as const)
              : (['authorises', 'beside'] as const)) {
              for (const encrypt of [true, false]) {
                const options: SessionOptions = encrypt
                  ? { kind: 'hmac', salt: srk, encrypt: 'both' }
                  : { kind: 'hmac', salt: srk };
                await inSession(tpm, options, async (session) => {
                  bus.forget();
                  const secret = await (place === 'authorises'
                    ? command((entity) => withSession(entity, session), [])
                    : command(withPassword, [session]));
                  assert.equal(secret.length, 32);
                  assert.equal(bus.saw(secret), !encrypt, `${name}, the session ${place}`);
                });
              }
            }
          }
        }),
      ),
    );
  });
});
