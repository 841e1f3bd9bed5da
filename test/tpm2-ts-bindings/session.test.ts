import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import {
  ObjectAttribute as A,
  Alg,
  Create,
  concat,
  flush,
  GetRandom,
  inSession,
  Load,
  type ObjectEntity,
  objectEntity,
  openSession,
  PolicyAuthValue,
  type PublicArea,
  permanent,
  policyDigest,
  publicArea,
  Rc,
  ReadClock,
  Rh,
  readRandom,
  rsaSrkTemplate,
  type SessionOptions,
  srkTemplate,
  type Tpm,
  TpmError,
  Unseal,
  withPassword,
  withSession,
} from 'tpm2-ts-bindings';
import { type RecordingProxy, startRecordingProxy } from '../support/recording-proxy.js';
import { type Swtpm, startSwtpm } from '../support/swtpm.js';
import { assertNothingLeaked, connectTpm, NOTHING, withPrimary } from '../support/tpm-fixture.js';

/** Data that its authValue opens; with `policy` through PolicyAuthValue instead. */
function dataTemplate(policy: boolean): PublicArea {
  return publicArea({
    type: Alg.KEYEDHASH,
    nameAlg: Alg.SHA256,
    objectAttributes: A.fixedTPM | A.fixedParent | A.noDA | (policy ? 0 : A.userWithAuth),
    authPolicy: policy ? policyDigest([{ assert: 'auth-value' }]) : NOTHING,
    parameters: { scheme: { scheme: Alg.NULL } },
    unique: NOTHING,
  });
}

async function withSealed<T>(
  tpm: Tpm,
  srk: ObjectEntity,
  content: { data: Buffer; auth: Buffer; policy?: boolean },
  body: (sealed: ObjectEntity) => Promise<T>,
): Promise<T> {
  const created = await tpm.run(
    Create,
    { parentHandle: withPassword(srk) },
    {
      inSensitive: { userAuth: content.auth, data: content.data },
      inPublic: dataTemplate(content.policy ?? false),
      outsideInfo: NOTHING,
      creationPCR: [],
    },
  );
  const { objectHandle } = await tpm.run(
    Load,
    { parentHandle: withPassword(srk) },
    { inPrivate: created.outPrivate, inPublic: created.outPublic },
  );
  try {
    return await body(objectEntity(objectHandle, created.outPublic, content.auth));
  } finally {
    await flush(tpm, objectHandle);
  }
}

const has = (code: TpmError['code']) => (error: unknown) => error instanceof TpmError && error.code === code;

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
          assert.ok(has('bad-hmac')(error) || has('malformed')(error), `byte ${at}: ${error}`);
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

  it('encryption without salt or bind cannot be asked for', async () => {
    // @ts-expect-error the options do not type-check
    const options: SessionOptions = { kind: 'hmac', encrypt: 'out' };
    await assert.rejects(openSession(tpm, options), has('usage'));
    // An empty authValue is no secret.
    const bind = permanent(Rh.OWNER);
    await assert.rejects(openSession(tpm, { kind: 'hmac', encrypt: 'out', bind }), has('usage'));
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

function flip(message: Buffer, at: number): Buffer {
  const out = Buffer.from(message);
  out[at] = (out[at] ?? 0) ^ 0x01;
  return out;
}
