import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import {
  Alg,
  Clear,
  ClearControl,
  DictionaryAttackLockReset,
  DictionaryAttackParameters,
  type Entity,
  HierarchyChangeAuth,
  HierarchyControl,
  inSession,
  PCR_Allocate,
  PCR_Extend,
  PCR_Reset,
  Pt,
  parsePcrSelection,
  permanent,
  Rh,
  readPcrs,
  readProperty,
  type Session,
  srkTemplate,
  type Tpm,
  withPassword,
  withSession,
} from 'tpm2-ts-bindings';
import { NOTHING, withPrimary, withSuiteTpm } from '../support/tpm-fixture.js';
import { says } from './make.js';

describe('tpm2-ts-bindings: hierarchies, dictionary attack protection, registers', () => {
  let tpm: Tpm;
  withSuiteTpm((made) => {
    tpm = made;
  });

  const LOCKOUT = withPassword(permanent(Rh.LOCKOUT));
  const PLATFORM = withPassword(permanent(Rh.PLATFORM));

  it('HierarchyChangeAuth: sessions prove the answer with the new authValue, bound ones too', async () => {
    const auths = [randomBytes(16), Buffer.from('00aa00bb0000', 'hex'), randomBytes(32), NOTHING];
    let old: Buffer = NOTHING;
    await withPrimary(tpm, srkTemplate(), async (srk) => {
      for (const kind of ['plain', 'salted', 'bound'] as const) {
        for (const newAuth of auths) {
          const owner = permanent(Rh.OWNER, old);
          const change = (entity: Entity, session: Session) =>
            tpm.run(HierarchyChangeAuth, { authHandle: withSession(entity, session) }, { newAuth });
          const options = {
            plain: { kind: 'hmac' },
            salted: { kind: 'hmac', salt: srk, encrypt: 'in' },
            bound: { kind: 'hmac', salt: srk, bind: owner, encrypt: 'in' },
          } as const;
          await inSession(tpm, options[kind], async (session) => {
            await change(owner, session);
            // The same session goes on with the new one.
            await change(permanent(Rh.OWNER, newAuth), session);
            await assert.rejects(
              change(permanent(Rh.OWNER, randomBytes(20)), session),
              says('BAD_AUTH', 'AUTH_FAIL'),
            );
          });
          old = newAuth;
        }
      }
    });
    await assert.rejects(
      tpm.run(HierarchyChangeAuth, { authHandle: LOCKOUT }, { newAuth: randomBytes(65) }),
      says('SIZE'),
    );
  });

  it('HierarchyControl: a hierarchy that is off makes no objects', async () => {
    const switchTo = (state: boolean, authHandle = PLATFORM) =>
      tpm.run(HierarchyControl, { authHandle }, { enable: Rh.OWNER, state });
    await switchTo(false);
    await assert.rejects(
      withPrimary(tpm, srkTemplate(), async () => undefined),
      says('HIERARCHY', 'HANDLE'),
    );
    await switchTo(true);
    await assert.rejects(switchTo(true, LOCKOUT), says('VALUE', 'HIERARCHY', 'AUTH_TYPE'));
  });

  it('DictionaryAttackParameters and DictionaryAttackLockReset', async () => {
    const set = (lockHandle = LOCKOUT) =>
      tpm.run(
        DictionaryAttackParameters,
        { lockHandle },
        { newMaxTries: 7, newRecoveryTime: 0xffff_ffff, lockoutRecovery: 86400 },
      );
    await set();
    assert.equal(await readProperty(tpm, Pt.MAX_AUTH_FAIL), 7);
    assert.equal(await readProperty(tpm, Pt.LOCKOUT_INTERVAL), 0xffff_ffff);
    assert.equal(await readProperty(tpm, Pt.LOCKOUT_RECOVERY), 86400);
    await tpm.run(DictionaryAttackLockReset, { lockHandle: LOCKOUT }, {});
    assert.equal(await readProperty(tpm, Pt.LOCKOUT_COUNTER), 0);
    await assert.rejects(set(PLATFORM), says('VALUE', 'HIERARCHY'));
    await assert.rejects(
      tpm.run(DictionaryAttackLockReset, { lockHandle: PLATFORM }, {}),
      says('VALUE', 'HIERARCHY'),
    );
  });

  it('Clear takes the authValues of owner and lockout, unless ClearControl has it off', async () => {
    const newAuth = randomBytes(16);
    await tpm.run(HierarchyChangeAuth, { authHandle: LOCKOUT }, { newAuth });
    const lockout = permanent(Rh.LOCKOUT, newAuth);
    await inSession(tpm, { kind: 'hmac' }, async (session) => {
      const auth = withSession(lockout, session);
      await tpm.run(ClearControl, { auth }, { disable: true });
      await assert.rejects(tpm.run(Clear, { authHandle: auth }, {}), says('DISABLED'));
      await assert.rejects(tpm.run(ClearControl, { auth }, { disable: false }), says('AUTH_FAIL'));
      await tpm.run(ClearControl, { auth: PLATFORM }, { disable: false });
      // The answer is proved with the empty authValue that comes.
      await tpm.run(Clear, { authHandle: auth }, {});
    });
    await inSession(tpm, { kind: 'hmac' }, (session) =>
      tpm.run(DictionaryAttackLockReset, { lockHandle: withSession(permanent(Rh.LOCKOUT), session) }, {}),
    );
  });

  it('PCR_Reset: the registers of applications, not those of the firmware', async () => {
    const selection = parsePcrSelection('sha256:23');
    const pcrHandle = withPassword(permanent(23));
    await tpm.run(PCR_Extend, { pcrHandle }, { digests: [{ hashAlg: Alg.SHA256, digest: randomBytes(32) }] });
    assert.notDeepEqual(await readPcrs(tpm, selection), [Buffer.alloc(32)]);
    await tpm.run(PCR_Reset, { pcrHandle }, {});
    assert.deepEqual(await readPcrs(tpm, selection), [Buffer.alloc(32)]);
    await assert.rejects(tpm.run(PCR_Reset, { pcrHandle: withPassword(permanent(0)) }, {}), says('LOCALITY'));
  });

  it('PCR_Allocate: the platform says which registers each bank has from the next power-on on', async () => {
    const all = Array.from({ length: 24 }, (_, pcr) => pcr);
    const pcrAllocation = [Alg.SHA1, Alg.SHA256].map((hash) => ({ hash, pcrs: all }));
    const { allocationSuccess, maxPcr } = await tpm.run(
      PCR_Allocate,
      { authHandle: PLATFORM },
      { pcrAllocation },
    );
    assert.deepEqual([allocationSuccess, maxPcr], [true, 24]);
    const owner = withPassword(permanent(Rh.OWNER));
    await assert.rejects(tpm.run(PCR_Allocate, { authHandle: owner }, { pcrAllocation }), says('VALUE'));
  });
});
