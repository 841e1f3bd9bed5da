import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import fc from 'fast-check';
import {
  Alg,
  AuditDigest,
  attestationKeyTemplate,
  auditedCommands,
  type Command,
  ContextLoad,
  ContextSave,
  Create,
  type Entity,
  GetCommandAuditDigest,
  GetRandom,
  GetSessionAuditDigest,
  type HandleNames,
  inSession,
  type ObjectEntity,
  PCR_Extend,
  permanent,
  Quote,
  ReadClock,
  ReadPublic,
  Rh,
  readRandom,
  type Session,
  type SessionOptions,
  SetCommandCodeAuditStatus,
  srkTemplate,
  type Tpm,
  verifyCommandAudit,
  verifySessionAudit,
  withPassword,
  withSession,
} from 'tpm2-ts-bindings';
import { NOTHING, withPrimary, withSuiteTpm } from '../support/tpm-fixture.js';
import { has, OWNER, says } from './make.js';

const inScheme = { scheme: Alg.NULL } as const;
const ENDORSEMENT = permanent(Rh.ENDORSEMENT);
const PCR = permanent(16);

/** A command of a series, as a log keeps it. Only those without authorisation: their handles are entities alone. */
interface Entry {
  readonly command: Command<HandleNames, unknown, unknown>;
  readonly handles: Readonly<Record<string, Entity>>;
  readonly params: unknown;
}
function entry<P, R>(
  command: Command<HandleNames, P, R>,
  handles: Readonly<Record<string, Entity>>,
  params: P,
): Entry {
  return { command, handles, params } as unknown as Entry;
}

describe('tpm2-ts-bindings: audits', () => {
  let tpm: Tpm;
  withSuiteTpm((made) => {
    tpm = made;
  });

  const withAk = (body: (ak: ObjectEntity) => Promise<void>) =>
    withPrimary(tpm, attestationKeyTemplate(), body);

  /** The TPM's word on a session. @param sessions say whether the session audits this command too */
  async function askSession(ak: ObjectEntity, session: Session, sessions: readonly Session[] = []) {
    const nonce = randomBytes(16);
    const { auditInfo, signature } = await tpm.run(
      GetSessionAuditDigest,
      {
        privacyAdminHandle: withPassword(ENDORSEMENT),
        signHandle: withPassword(ak),
        sessionHandle: session,
      },
      { qualifyingData: nonce, inScheme },
      sessions,
    );
    return { auditInfo, signature, expected: { key: ak.publicArea.value, nonce } };
  }

  async function assertSame(ak: ObjectEntity, session: Session, exclusive: boolean): Promise<void> {
    const digest = session.auditDigest;
    assert.ok(digest);
    const { auditInfo, signature, expected } = await askSession(ak, session, [session]);
    const { attested } = verifySessionAudit(auditInfo, signature, { ...expected, digest, exclusive });
    assert.deepEqual(attested.sessionDigest, digest);
    assert.equal(attested.exclusiveSession, exclusive);
    // That one was audited too, after its statement was made.
    assert.notDeepEqual(session.auditDigest, digest);
  }

  it('what a session audits here is what the TPM signs, whatever else the session does', async () => {
    const auth = randomBytes(12);
    await withAk((ak) =>
      withPrimary(
        tpm,
        srkTemplate(),
        async (srk) => {
          const kinds: SessionOptions[] = [
            { kind: 'hmac', audit: true },
            { kind: 'hmac', audit: true, authHash: Alg.SHA384 },
            { kind: 'hmac', audit: 'exclusive', salt: srk, bind: srk, encrypt: 'both' },
            { kind: 'hmac', audit: true, bind: srk, encrypt: 'in', authHash: Alg.SHA1 },
            { kind: 'hmac', audit: true, salt: srk, encrypt: 'out' },
            // It audits where it has nothing else to do.
            { kind: 'hmac' },
          ];
          for (const options of kinds) {
            await inSession(tpm, options, async (session) => {
              assert.equal(session.auditDigest, undefined);
              await assert.rejects(askSession(ak, session), says('TYPE'), 'nothing was audited');
              await tpm.run(ReadClock, {}, {}, [session]);
              await assertSame(ak, session, true);
              // It authorises, and encrypts what it can.
              if (options.audit !== undefined) {
                await tpm.run(
                  Create,
                  { parentHandle: withSession(srk, session) },
                  {
                    inSensitive: { userAuth: NOTHING, data: NOTHING },
                    inPublic: attestationKeyTemplate(),
                    outsideInfo: NOTHING,
                    creationPCR: [],
                  },
                );
                await tpm.run(
                  PCR_Extend,
                  { pcrHandle: withSession(PCR, session) },
                  { digests: [{ hashAlg: Alg.SHA256, digest: randomBytes(32) }] },
                );
                assert.equal((await readRandom(tpm, 8, [session])).length, 8);
              }
              // What fails is not audited.
              const before = session.auditDigest;
              const nothing = permanent(0x81000077);
              await assert.rejects(
                tpm.run(ReadPublic, { objectHandle: nothing }, {}, [session]),
                says('HANDLE'),
              );
              assert.deepEqual(session.auditDigest, before);
              await assertSame(ak, session, true);
            });
          }
        },
        auth,
      ),
    );
  });

  it('a command more, less, in another place or with another parameter or answer: another digest', async () => {
    await withAk(async (ak) => {
      const one = fc.oneof(
        fc.integer({ min: 1, max: 32 }).map((n) => entry(GetRandom, {}, { bytesRequested: n })),
        fc.constant(entry(ReadClock, {}, {})),
        fc.constant(entry(ReadPublic, { objectHandle: ak }, {})),
      );
      await fc.assert(
        fc.asyncProperty(fc.array(one, { minLength: 2, maxLength: 6 }), fc.nat(), async (series, at) => {
          await inSession(tpm, { kind: 'hmac', audit: true }, async (session) => {
            const log: { sent: Entry; result: unknown }[] = [];
            for (const sent of series) {
              const result = await tpm.run(sent.command, sent.handles as never, sent.params, [session]);
              log.push({ sent, result });
            }
            const { auditInfo, signature, expected } = await askSession(ak, session);
            const check = (entries: typeof log) => {
              const digest = new AuditDigest();
              for (const { sent, result } of entries)
                digest.take(sent.command, sent.handles as never, sent.params, result);
              return verifySessionAudit(auditInfo, signature, { ...expected, digest: digest.value });
            };
            assert.deepEqual(check(log).attested.sessionDigest, session.auditDigest);

            const i = at % log.length;
            const picked = log[i];
            assert.ok(picked);
            const other = entry(GetRandom, {}, { bytesRequested: 33 });
            const wrong: (typeof log)[] = [
              log.toSpliced(i, 1),
              log.toSpliced(i, 0, picked),
              log.with(i, { ...picked, sent: other, result: { randomBytes: NOTHING } }),
              log.with(i, {
                sent: entry(GetRandom, {}, { bytesRequested: 4 }),
                result: { randomBytes: randomBytes(4) },
              }),
            ];
            // Answers differ, so places do, but for constant ones.
            const [first, second] = [log[0], log[1]];
            if (first && second && first.sent.command !== second.sent.command)
              wrong.push([second, first, ...log.slice(2)]);
            for (const entries of wrong) assert.throws(() => check(entries), /other commands or answers/);
          });
        }),
        { numRuns: 15 },
      );
    });
  });

  it('an exclusive audit ends with a foreign command, and a reset begins it anew', async () => {
    await withAk(async (ak) => {
      await inSession(tpm, { kind: 'hmac', audit: 'exclusive' }, async (session) => {
        assert.equal(session.isExclusive, false);
        await tpm.run(ReadClock, {}, {}, [session]);
        assert.equal(session.isExclusive, true);
        await tpm.run(ReadClock, {}, {});
        for (let time = 0; time < 2; time++)
          await assert.rejects(tpm.run(ReadClock, {}, {}, [session]), says('EXCLUSIVE'));
        const lost = session.auditDigest;
        session.resetAudit();
        // The reset waits for a command that succeeds.
        await assert.rejects(
          tpm.run(ReadPublic, { objectHandle: permanent(0x81000077) }, {}, [session]),
          says('HANDLE'),
        );
        const params = { bytesRequested: 20 };
        const result = await tpm.run(GetRandom, {}, params, [session]);
        const anew = new AuditDigest();
        anew.take(GetRandom, {}, params, result);
        assert.deepEqual(session.auditDigest, anew.value);
        assert.notDeepEqual(session.auditDigest, lost);
        // It was for that one command.
        anew.take(GetRandom, {}, params, await tpm.run(GetRandom, {}, params, [session]));
        assert.deepEqual(session.auditDigest, anew.value);
        await assertSame(ak, session, true);
      });

      await inSession(tpm, { kind: 'hmac', audit: true }, async (session) => {
        await tpm.run(ReadClock, {}, {}, [session]);
        await tpm.run(ReadClock, {}, {});
        // It goes on, and the TPM says that it was not alone.
        await tpm.run(ReadClock, {}, {}, [session]);
        assert.equal(session.isExclusive, false);
        const digest = session.auditDigest;
        assert.ok(digest);
        const { auditInfo, signature, expected } = await askSession(ak, session);
        verifySessionAudit(auditInfo, signature, { ...expected, digest });
        const refused = (text: RegExp, change: Partial<Parameters<typeof verifySessionAudit>[2]>) =>
          assert.throws(
            () => verifySessionAudit(auditInfo, signature, { ...expected, digest, ...change }),
            text,
          );
        refused(/not exclusive/, { exclusive: true });
        refused(/other commands or answers/, { digest: Buffer.alloc(32) });
        refused(/another nonce/, { nonce: NOTHING });
        const quote = await tpm.run(
          Quote,
          { signHandle: withPassword(ak) },
          { qualifyingData: expected.nonce, inScheme, pcrSelect: [] },
        );
        assert.throws(
          () => verifySessionAudit(quote.quoted, quote.signature, { ...expected, digest }),
          /something else/,
        );
      });
    });
  });

  it('an audit goes on in a session that was saved and loaded', async () => {
    await withAk((ak) =>
      inSession(tpm, { kind: 'hmac', audit: true }, async (session) => {
        await tpm.run(ReadClock, {}, {}, [session]);
        const { context } = await tpm.run(ContextSave, { saveHandle: session }, {});
        await tpm.run(ContextLoad, {}, { context });
        await tpm.run(ReadClock, {}, {}, [session]);
        const digest = session.auditDigest;
        assert.ok(digest);
        const { auditInfo, signature, expected } = await askSession(ak, session);
        verifySessionAudit(auditInfo, signature, { ...expected, digest });
      }),
    );
  });

  it('what cannot audit is refused', async () => {
    // @ts-expect-error a policy session does not audit
    const options: SessionOptions = { kind: 'policy', audit: true };
    await inSession(tpm, options, (session) =>
      assert.rejects(tpm.run(ReadClock, {}, {}, [session]), has('usage')),
    );
    await inSession(tpm, { kind: 'hmac' }, async (session) => {
      assert.throws(() => session.resetAudit(), has('usage'));
      await inSession(tpm, { kind: 'hmac' }, (second) =>
        assert.rejects(
          tpm.run(ReadClock, {}, {}, [session, second]),
          says('ATTRIBUTES'),
          'one audit a command',
        ),
      );
    });
  });

  it('the command audit: what was asked for is in the digest, whoever sent it, and nothing else', async () => {
    const set = (auditAlg: number, setList: readonly number[], clearList: readonly number[]) => {
      const params = { auditAlg, setList, clearList };
      return tpm
        .run(SetCommandCodeAuditStatus, { auth: withPassword(OWNER) }, params)
        .then((result) => ({ params, result }));
    };
    await withAk(async (ak) => {
      const ask = async () => {
        const nonce = randomBytes(16);
        const { auditInfo, signature } = await tpm.run(
          GetCommandAuditDigest,
          { privacyHandle: withPassword(ENDORSEMENT), signHandle: withPassword(ak) },
          { qualifyingData: nonce, inScheme },
        );
        return { auditInfo, signature, expected: { key: ak.publicArea.value, nonce } };
      };
      let counter = 0n;
      for (const digestAlg of [Alg.SHA256, Alg.SHA384]) {
        const digest = new AuditDigest(digestAlg);
        // A new hash goes alone, and is not audited.
        await set(digestAlg, [], []);
        await ask();
        const codes = [GetRandom.code, ReadClock.code];
        const { params, result } = await set(Alg.NULL, codes, []);
        digest.take(SetCommandCodeAuditStatus, { auth: OWNER }, params, result);
        for (const bytesRequested of [4, 9]) {
          const params = { bytesRequested };
          digest.take(GetRandom, {}, params, await tpm.run(GetRandom, {}, params));
          await tpm.run(ReadPublic, { objectHandle: ak }, {});
        }
        digest.take(ReadClock, {}, {}, await tpm.run(ReadClock, {}, {}));
        const { auditInfo, signature, expected } = await ask();
        const commandDigest = auditedCommands([...codes, SetCommandCodeAuditStatus.code], digestAlg);
        const all: Parameters<typeof verifyCommandAudit>[2] = {
          ...expected,
          digest: digest.value,
          digestAlg,
          commandDigest,
        };
        const { attested } = verifyCommandAudit(auditInfo, signature, all);
        assert.ok(attested.auditCounter > counter);
        counter = attested.auditCounter;
        const refused = (text: RegExp, change: Partial<typeof all>) =>
          assert.throws(() => verifyCommandAudit(auditInfo, signature, { ...all, ...change }), text);
        refused(/another hash/, { digestAlg: Alg.SHA512 });
        refused(/other commands are audited/, { commandDigest: auditedCommands(codes, digestAlg) });
        refused(/of other commands or answers/, { digest: new AuditDigest(digestAlg).value });
        refused(/another nonce/, { nonce: NOTHING });

        // Signed, it begins anew.
        const next = new AuditDigest(digestAlg);
        next.take(ReadClock, {}, {}, await tpm.run(ReadClock, {}, {}));
        const again = await ask();
        verifyCommandAudit(again.auditInfo, again.signature, {
          ...all,
          ...again.expected,
          digest: next.value,
        });
        await set(Alg.NULL, [], codes);
        const cleared = await ask();
        assert.throws(
          () => verifyCommandAudit(cleared.auditInfo, cleared.signature, { ...all, ...cleared.expected }),
          /other commands are audited/,
        );
      }
    });
  });
});
