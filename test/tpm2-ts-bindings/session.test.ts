import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import {
  Alg,
  AuditDigest,
  type Authorized,
  ContextLoad,
  ContextSave,
  concat,
  flush,
  GetRandom,
  HierarchyChangeAuth,
  Ht,
  inSession,
  Load,
  listHandles,
  MakeCredential,
  NV_Read,
  NV_Write,
  NvAttribute,
  type NvEntity,
  type ObjectEntity,
  openSession,
  PolicyAuthValue,
  PolicyPassword,
  PolicyRestart,
  type PolicyStep,
  type Public,
  permanent,
  policyDigest,
  publicArea,
  Rc,
  ReadClock,
  ReadPublic,
  Rh,
  readRandom,
  rsaSrkTemplate,
  runPolicy,
  type Session,
  type SessionOptions,
  srkTemplate,
  type Tpm,
  TpmError,
  Unseal,
  unnamed,
  withPassword,
  withSession,
} from 'tpm2-ts-bindings';
import { isA } from '../support/is-a.js';
import { type RecordingProxy, startRecordingProxy } from '../support/recording-proxy.js';
import { type Swtpm, startSwtpm } from '../support/swtpm.js';
import { assertNothingLeaked, connectTpm, NOTHING, withPrimary } from '../support/tpm-fixture.js';
import { create, dataTemplate, has, OWNER, says, withChild, withNv } from './make.js';

async function withSealed<T>(
  tpm: Tpm,
  srk: ObjectEntity,
  content: { data: Buffer; auth: Buffer; policy?: boolean },
  body: (sealed: ObjectEntity) => Promise<T>,
): Promise<T> {
  const sealed = await create(tpm, srk, dataTemplate({ policy: content.policy ?? false }), content);
  return withChild(tpm, srk, sealed, body, content.auth);
}

describe('tpm2-ts-bindings: sessions', () => {
  let swtpm: Swtpm;
  let bus: RecordingProxy;
  let tpm: Tpm;
  /** What the interposer does with the next responses. */
  let tamper: ((response: Buffer) => Buffer) | undefined;
  let tamperCommand: ((command: Buffer) => Buffer) | undefined;

  before(async () => {
    swtpm = await startSwtpm();
    bus = await startRecordingProxy(swtpm.socket, {
      response: (message) => tamper?.(message) ?? message,
      command: (message) => tamperCommand?.(message) ?? message,
    });
    tpm = await connectTpm(bus.path);
  });
  afterEach(() => {
    tamper = undefined;
    tamperCommand = undefined;
  });
  after(async () => {
    await assertNothingLeaked(tpm);
    await tpm.close();
    await bus.close();
    await swtpm.stop();
  });

  const listSessions = async () => [
    ...(await listHandles(tpm, Ht.HMAC_SESSION)),
    ...(await listHandles(tpm, Ht.POLICY_SESSION)),
  ];

  for (const [srkKind, template] of [
    ['ECC P-256', srkTemplate()],
    ['RSA 2048', rsaSrkTemplate()],
  ] as const) {
    it(`every kind of session works with an SRK of ${srkKind}`, async () => {
      const data = randomBytes(40);
      const auth = concat(randomBytes(8), Buffer.of(0), randomBytes(8));
      await withPrimary(tpm, template, async (srk) => {
        for (const kind of ['hmac', 'policy'] as const) {
          await withSealed(tpm, srk, { data, auth, policy: kind === 'policy' }, async (sealed) => {
            const options: SessionOptions[] = [
              { kind },
              { kind, bind: sealed },
              { kind, bind: srk },
              { kind, salt: srk },
              { kind, encrypt: 'out', salt: srk },
              { kind, encrypt: 'in', salt: srk },
              { kind, encrypt: 'both', bind: sealed },
              { kind, encrypt: 'both', salt: srk, bind: sealed },
              { kind, encrypt: 'both', salt: srk, authHash: Alg.SHA384 },
            ];
            for (const option of options) {
              const policy = kind === 'policy';
              if (policy && option.authHash !== undefined) continue; // The policy's hash is the object's.
              bus.forget();
              await inSession(tpm, option, async (session) => {
                // Twice: nonces roll, and a policy starts anew.
                for (let time = 0; time < 2; time++) {
                  if (policy) await tpm.run(PolicyAuthValue, { policySession: session }, {});
                  const { outData } = await tpm.run(Unseal, { itemHandle: withSession(sealed, session) }, {});
                  assert.deepEqual(outData, data);
                }
              });
              const hidden = option.encrypt === 'out' || option.encrypt === 'both';
              assert.equal(bus.received().includes(data), !hidden, JSON.stringify(option.encrypt));
              assert.equal(bus.sent().includes(auth), false, 'the authValue itself is never sent');
            }
          });
        }
      });
    });
  }

  it('auth values with zeros inside and at the end authorise', async () => {
    const auths = [
      Buffer.from('00', 'hex'),
      Buffer.from('000001', 'hex'),
      Buffer.from('ff0000', 'hex'),
      Buffer.from('0100ff00', 'hex'),
      Buffer.from('00000000000000000000000000000000', 'hex'),
      Buffer.concat([randomBytes(15), Buffer.of(0), randomBytes(14), Buffer.of(0, 0)]),
    ];
    await withPrimary(tpm, srkTemplate(), async (srk) => {
      for (const auth of auths) {
        const data = randomBytes(16);
        await withSealed(tpm, srk, { data, auth }, async (sealed) => {
          const { outData } = await tpm.run(Unseal, { itemHandle: withPassword(sealed) }, {});
          assert.deepEqual(outData, data);
          for (const options of [{ kind: 'hmac' }, { kind: 'hmac', salt: srk, bind: sealed }] as const) {
            await inSession(tpm, options, async (session) => {
              const opened = await tpm.run(Unseal, { itemHandle: withSession(sealed, session) }, {});
              assert.deepEqual(opened.outData, data, auth.toString('hex'));
            });
          }
        });
      }
    });
  });

  it('an encrypting session beside the authorising one is covered by its HMAC', async () => {
    await withPrimary(tpm, srkTemplate(), async (srk) => {
      const data = randomBytes(32);
      await withSealed(tpm, srk, { data, auth: Buffer.from('auth') }, async (sealed) => {
        await inSession(tpm, { kind: 'hmac' }, (first) =>
          inSession(tpm, { kind: 'hmac', encrypt: 'both', salt: srk }, async (second) => {
            bus.forget();
            const itemHandle = withSession(sealed, first);
            assert.deepEqual((await tpm.run(Unseal, { itemHandle }, {}, [second])).outData, data);
            assert.equal(bus.saw(data), false);
          }),
        );
      });
    });
  });

  it('a session that has nothing else to do proves the answer', async () => {
    await withPrimary(tpm, srkTemplate(), (srk) =>
      inSession(tpm, { kind: 'hmac', salt: srk, bind: srk }, async (session) => {
        await tpm.run(ReadClock, {}, {}, [session]);
        await tpm.run(ReadClock, {}, {}, [session]);
        tamper = (response) => flip(response, 17);
        await assert.rejects(tpm.run(ReadClock, {}, {}, [session]), has('bad-hmac'));
      }),
    );
  });

  it('two concurrent commands get their own answers', async () => {
    await withPrimary(tpm, srkTemplate(), async (srk) => {
      await inSession(tpm, { kind: 'hmac', encrypt: 'both', salt: srk }, async (session) => {
        const sizes = [8, 16, 24, 32, 5, 9];
        const answers = await Promise.all(
          sizes.map((size, at) =>
            tpm.run(GetRandom, {}, { bytesRequested: size }, at % 2 === 0 ? [session] : []),
          ),
        );
        assert.deepEqual(
          answers.map((answer) => answer.randomBytes.length),
          sizes,
        );
      });
    });
  });

  it('a failed command does not hold up the next one', async () => {
    const [failed, passed] = await Promise.allSettled([
      tpm.run(Unseal, { itemHandle: withPassword(permanent(Rh.OWNER)) }, {}),
      readRandom(tpm, 16),
    ]);
    assert.equal(failed.status, 'rejected');
    assert.equal(passed.status, 'fulfilled');
  });

  it('a flipped response bit is refused, wherever it is, and poisons the session', async () => {
    await withPrimary(tpm, srkTemplate(), async (srk) => {
      let length = 0;
      await inSession(tpm, { kind: 'hmac', encrypt: 'out', salt: srk }, async (session) => {
        await readRandom(tpm, 16, [session]);
        length = bus.responses.at(-1)?.length ?? 0;
      });
      // 14 is the first byte of the parameters, after header and parameterSize.
      for (const at of [14, 16, 31, 32, 34, 40, 66, 67, 69, length - 1]) {
        const session = await openSession(tpm, { kind: 'hmac', encrypt: 'out', salt: srk });
        tamper = (response) => flip(response, at);
        await assert.rejects(readRandom(tpm, 16, [session]), (error) => {
          assert.ok(
            isA(error, TpmError) && /^(bad-hmac|malformed)$/.test(error.code),
            `byte ${at}: ${error}`,
          );
          return true;
        });
        tamper = undefined;
        await assert.rejects(readRandom(tpm, 16, [session]), has('poisoned'));
        await session.close();
      }
    });
  });

  it('a flipped command bit is refused by the TPM', async () => {
    await withPrimary(tpm, srkTemplate(), (srk) =>
      inSession(tpm, { kind: 'hmac', salt: srk, encrypt: 'out' }, async (session) => {
        tamperCommand = (command) => flip(command, command.length - 1); // The number of bytes asked for.
        await assert.rejects(readRandom(tpm, 16, [session]), (error) =>
          TpmError.is(error, Rc.AUTH_FAIL, Rc.BAD_AUTH),
        );
        tamperCommand = undefined;
        // An answer with a response code leaves the session as it was.
        assert.equal((await readRandom(tpm, 16, [session])).length, 16);
      }),
    );
  });

  it('an answer made with another key is refused', async () => {
    await withPrimary(tpm, srkTemplate(), (srk) =>
      inSession(tpm, { kind: 'hmac', salt: srk, encrypt: 'out' }, async (session) => {
        await readRandom(tpm, 16, [session]);
        const old = bus.responses.at(-1);
        assert.ok(old);
        tamper = () => old;
        await assert.rejects(readRandom(tpm, 16, [session]), has('bad-hmac'), 'a replayed answer');
      }),
    );
  });

  it('a first session that authorises nothing covers no nonce of the others', async () => {
    await withPrimary(tpm, srkTemplate(), async (srk) => {
      const kind = 'hmac';
      const sets: SessionOptions[][] = [
        [{ kind }, { kind, salt: srk, encrypt: 'both' }],
        [
          { kind, salt: srk },
          { kind, salt: srk, encrypt: 'in' },
          { kind, salt: srk, encrypt: 'out' },
        ],
        [{ kind, salt: srk, encrypt: 'in' }, { kind, salt: srk, encrypt: 'out' }, { kind }],
      ];
      for (const set of sets) {
        const sessions = await Promise.all(set.map((options) => openSession(tpm, options)));
        const credential = randomBytes(32);
        bus.forget();
        for (let time = 0; time < 2; time++) {
          const params = { credential, objectName: srk.name };
          const { secret } = await tpm.run(MakeCredential, { handle: srk }, params, sessions);
          assert.ok(secret.length > 64);
        }
        assert.equal(bus.saw(credential), false);
        for (const session of sessions) await session.close();
      }
    });
  });

  it('a session stays bound until it has audited a command', async () => {
    const auth = randomBytes(9);
    await withPrimary(
      tpm,
      srkTemplate(),
      async (srk) => {
        const load = (session: Session) =>
          assert.rejects(
            tpm.run(
              Load,
              { parentHandle: withSession(srk, session) },
              { inPrivate: NOTHING, inPublic: srkTemplate() },
            ),
            // It was authorised.
            says('SIZE'),
          );
        await inSession(tpm, { kind: 'hmac', bind: srk }, async (session) => {
          await load(session);
          const nothing = permanent(0x81000077);
          await assert.rejects(tpm.run(ReadPublic, { objectHandle: nothing }, {}, [session]), says('HANDLE'));
          await load(session);
          await tpm.run(ReadClock, {}, {}, [session]);
          await load(session);
        });
      },
      auth,
    );
  });

  it('a bound session goes on after the first write has changed the Name it is bound to', async () => {
    const data = randomBytes(16);
    const auth = randomBytes(16);
    const attributes = NvAttribute.AUTHREAD | NvAttribute.AUTHWRITE | NvAttribute.NO_DA;
    await withNv(tpm, { attributes, size: 16, auth }, (fresh, current) =>
      inSession(tpm, { kind: 'hmac', bind: fresh, encrypt: 'both' }, async (session) => {
        const authorised = (nvIndex: NvEntity) => ({ authHandle: withSession(nvIndex, session), nvIndex });
        await tpm.run(NV_Write, authorised(fresh), { data, offset: 0 });
        for (let time = 0; time < 2; time++) {
          const read = await tpm.run(NV_Read, authorised(await current()), { size: 16, offset: 0 });
          assert.deepEqual(read.data, data);
        }
      }),
    );
  });

  it('closing waits for the command that is under way', async () => {
    await withPrimary(tpm, srkTemplate(), async (srk) => {
      const session = await openSession(tpm, { kind: 'hmac', salt: srk, encrypt: 'out' });
      let closed: Promise<void> | undefined;
      tamperCommand = (command) => {
        closed ??= session.close();
        return command;
      };
      assert.equal((await readRandom(tpm, 16, [session])).length, 16);
      assert.ok(closed);
      await closed;
      await assert.rejects(readRandom(tpm, 16, [session]), has('usage'));
    });
  });

  it('an audit that is reset while a command is under way begins anew with the next one', async () => {
    await inSession(tpm, { kind: 'hmac', audit: true }, async (session) => {
      const params = { bytesRequested: 8 };
      tamperCommand = (command) => {
        session.resetAudit();
        return command;
      };
      await tpm.run(GetRandom, {}, params, [session]);
      tamperCommand = undefined;
      const digest = new AuditDigest();
      digest.take(GetRandom, {}, params, await tpm.run(GetRandom, {}, params, [session]));
      assert.deepEqual(session.auditDigest, digest.value);
    });
  });

  it('after PolicyPassword a session authorises, and nothing else', async () => {
    await withPrimary(tpm, srkTemplate(), (srk) =>
      inSession(tpm, { kind: 'policy', salt: srk, encrypt: 'out' }, async (session) => {
        await tpm.run(PolicyPassword, { policySession: session }, {});
        bus.forget();
        await assert.rejects(readRandom(tpm, 8, [session]), has('usage'));
        assert.equal(bus.commands.length, 0);
        await tpm.run(PolicyRestart, { policySession: session }, {});
        assert.equal((await readRandom(tpm, 8, [session])).length, 8);
      }),
    );
  });

  it('an answer to StartAuthSession that is none is refused', async () => {
    for (const change of [
      // A handle of another type, and a nonce that is shorter than the caller's.
      (response: Buffer) => flip(response, 10),
      (response: Buffer) => {
        const short = Buffer.from(response.subarray(0, response.length - 16));
        short.writeUInt32BE(short.length, 2);
        short.writeUInt16BE(16, 14);
        return short;
      },
    ]) {
      tamper = (response) => (response.length > 16 ? change(response) : response);
      await assert.rejects(openSession(tpm, { kind: 'hmac' }), has('malformed'));
      tamper = undefined;
      for (const handle of await listHandles(tpm, Ht.HMAC_SESSION)) await flush(tpm, handle);
    }
  });

  it('attributes and nonces that do not answer the command are refused where no HMAC covers them', async () => {
    const content = { data: randomBytes(8), auth: NOTHING };
    const open: PolicyStep[] = [{ assert: 'locality', locality: 0b1 }];
    await withPrimary(tpm, srkTemplate(), async (srk) => {
      const template = publicArea({
        ...dataTemplate({ policy: true }).value,
        authPolicy: policyDigest(open),
      } as Public);
      await withChild(tpm, srk, await create(tpm, srk, template, content), async (item) => {
        for (let bit = 0; bit < 8; bit++) {
          await inSession(tpm, { kind: 'policy' }, async (session) => {
            await runPolicy(tpm, session, open);
            tamper = (response) => flip(response, response.length - 3, 1 << bit);
            const itemHandle = withSession(item, session);
            await assert.rejects(tpm.run(Unseal, { itemHandle }, {}), has('malformed'), `bit ${bit}`);
            tamper = undefined;
            await assert.rejects(tpm.run(Unseal, { itemHandle }, {}), has('poisoned'));
          });
        }
      });
      // Nor a nonce of another length.
      await withChild(tpm, srk, await create(tpm, srk, template, content), (item) =>
        inSession(tpm, { kind: 'policy' }, async (session) => {
          await runPolicy(tpm, session, open);
          tamper = (response) => {
            // Nonce, attributes and empty HMAC are its end.
            const start = response.length - 2 - 32 - 3;
            const short = Buffer.concat([
              response.subarray(0, start),
              Buffer.of(0, 31),
              response.subarray(start + 3),
            ]);
            short.writeUInt32BE(short.length, 2);
            return short;
          };
          const itemHandle = withSession(item, session);
          await assert.rejects(tpm.run(Unseal, { itemHandle }, {}), has('malformed'));
          tamper = undefined;
        }),
      );
      // A password has none but continueSession.
      await withSealed(tpm, srk, content, async (item) => {
        tamper = (response) => flip(response, response.length - 3, 0x40);
        await assert.rejects(tpm.run(Unseal, { itemHandle: withPassword(item) }, {}), has('malformed'));
        tamper = undefined;
      });
    });
  });

  it('a session for once is gone with the command that succeeds', async () => {
    const auth = randomBytes(10);
    const data = randomBytes(20);
    await withPrimary(tpm, srkTemplate(), async (srk) => {
      for (const kind of ['hmac', 'policy'] as const) {
        await withSealed(tpm, srk, { data, auth, policy: kind === 'policy' }, async (sealed) => {
          for (const options of [
            { kind, once: true },
            { kind, once: true, salt: srk, bind: sealed, encrypt: 'both' },
          ] as const) {
            await inSession(tpm, options, async (session) => {
              const unseal = async (item: ObjectEntity) => {
                if (kind === 'policy') await runPolicy(tpm, session, [{ assert: 'auth-value' }]);
                return (await tpm.run(Unseal, { itemHandle: withSession(item, session) }, {})).outData;
              };
              const other = { ...sealed, authValue: randomBytes(5) };
              await assert.rejects(
                unseal(other),
                says('AUTH_FAIL', 'BAD_AUTH'),
                'what fails does not end it',
              );
              assert.deepEqual(await unseal(sealed), data);
              assert.deepEqual(await listSessions(), []);
              bus.forget();
              const itemHandle = withSession(sealed, session);
              await assert.rejects(tpm.run(Unseal, { itemHandle }, {}), has('usage'));
            });
            assert.equal(bus.commands.length, 0, 'nothing was left to flush');

            const unused = await openSession(tpm, options);
            await unused.close();
            assert.deepEqual(await listSessions(), []);
          }
        });
      }
    });
  });

  it('a poisoned session is flushed at close', async () => {
    for (const once of [false, true]) {
      const session = await openSession(tpm, { kind: 'hmac', once });
      // The TPM never sees the command, so it keeps the session in both cases.
      tamperCommand = (command) => flip(command, 9);
      tamper = () => Buffer.from('80020000000a00000000', 'hex');
      await assert.rejects(readRandom(tpm, 8, [session]), has('malformed'));
      tamper = tamperCommand = undefined;
      await assert.rejects(readRandom(tpm, 8, [session]), has('poisoned'));
      assert.deepEqual(await listSessions(), [session.handle]);
      await session.close();
      assert.deepEqual(await listSessions(), []);
    }
  });

  it('a session whose command got no answer is poisoned', async () => {
    const mortal = await startSwtpm();
    const client = await connectTpm(mortal.socket);
    try {
      const session = await openSession(client, { kind: 'hmac' });
      await mortal.kill();
      await assert.rejects(readRandom(client, 8, [session]), has('transport'));
      await assert.rejects(readRandom(client, 8, [session]), has('poisoned'));
      await session.close();
    } finally {
      await client.close();
      await mortal.stop();
    }
  });

  it('one session authorises, encrypts and audits in turn, also after it was saved and loaded', async () => {
    const [auth, owner] = [randomBytes(11), randomBytes(7)];
    const data = randomBytes(24);
    const newAuth = (by: Authorized, value: Buffer) =>
      tpm.run(HierarchyChangeAuth, { authHandle: by }, { newAuth: value });
    await withPrimary(tpm, srkTemplate(), (srk) =>
      withSealed(tpm, srk, { data, auth }, async (sealed) => {
        await inSession(tpm, { kind: 'hmac', salt: srk, bind: sealed, encrypt: 'both' }, async (session) => {
          const round = async () => {
            const { outData } = await tpm.run(Unseal, { itemHandle: withSession(sealed, session) }, {});
            assert.deepEqual(outData, data);
            assert.equal((await readRandom(tpm, 8, [session])).length, 8);
            await newAuth(withSession(OWNER, session), owner);
            await newAuth(withSession(permanent(Rh.OWNER, owner), session), NOTHING);
            await tpm.run(ReadClock, {}, {}, [session]);
          };
          for (let time = 0; time < 2; time++) {
            await round();
            const { context } = await tpm.run(ContextSave, { saveHandle: session }, {});
            await tpm.run(ContextLoad, {}, { context });
          }
          await round();
        });
      }),
    );
    // What a policy has come to is in the context, what it makes the use prove is here.
    await withPrimary(tpm, srkTemplate(), (srk) =>
      withSealed(tpm, srk, { data, auth, policy: true }, (sealed) =>
        inSession(tpm, { kind: 'policy', salt: srk, encrypt: 'out' }, async (session) => {
          await tpm.run(PolicyAuthValue, { policySession: session }, {});
          const { context } = await tpm.run(ContextSave, { saveHandle: session }, {});
          await tpm.run(ContextLoad, {}, { context });
          const { outData } = await tpm.run(Unseal, { itemHandle: withSession(sealed, session) }, {});
          assert.deepEqual(outData, data);
          // A saved one is flushed too.
          await tpm.run(ContextSave, { saveHandle: session }, {});
        }),
      ),
    );
  });

  it('encryption without salt or bind cannot be asked for', async () => {
    // @ts-expect-error the options do not type-check
    const options: SessionOptions = { kind: 'hmac', encrypt: 'out' };
    await assert.rejects(openSession(tpm, options), has('usage'));
    // An empty authValue is no secret.
    const bind = OWNER;
    await assert.rejects(openSession(tpm, { kind: 'hmac', encrypt: 'out', bind }), has('usage'));
    // With a handle alone nobody knows what it is bound to.
    const handle = { ...unnamed(Rh.OWNER), authValue: randomBytes(4) };
    await assert.rejects(openSession(tpm, { kind: 'hmac', bind: handle }), has('usage'));
  });

  it('misuse is refused before anything is sent', async () => {
    bus.forget();
    const session = await openSession(tpm, { kind: 'trial' });
    await assert.rejects(readRandom(tpm, 4, [session]), has('usage'), 'a trial session');
    await session.close();
    await session.close();
    await assert.rejects(readRandom(tpm, 4, [session]), has('usage'), 'a closed session');
    await inSession(tpm, { kind: 'hmac' }, async (twice) => {
      const itemHandle = withSession(permanent(Rh.OWNER), twice);
      await assert.rejects(tpm.run(Unseal, { itemHandle }, {}, [twice]), has('usage'), 'the same one twice');
    });
    // Two StartAuthSession and two FlushContext.
    assert.equal(bus.commands.length, 4);
  });
});

function flip(message: Buffer, at: number, bits = 0x01): Buffer {
  const out = Buffer.from(message);
  out[at] = (out[at] ?? 0) ^ bits;
  return out;
}
