import assert from 'node:assert/strict';
import { createHash, randomBytes } from 'node:crypto';
import {
  inSession,
  mask,
  NvAttribute as N,
  NV_ChangeAuth,
  NV_Extend,
  NV_GlobalWriteLock,
  NV_Read,
  NV_ReadLock,
  NV_SetBits,
  NV_Write,
  NV_WriteLock,
  type NvEntity,
  nvEntity,
  policyDigest,
  runPolicy,
  type Tpm,
  withPassword,
  withSession,
} from 'tpm2-ts-bindings';
import { withSuiteTpm } from '../support/tpm-fixture.js';
import { OWNER, says, withNv } from './make.js';

const OPEN = N.OWNERWRITE | N.OWNERREAD | N.NO_DA;

describe('tpm2-ts-bindings: non-volatile storage', () => {
  let tpm: Tpm;
  withSuiteTpm((made) => {
    tpm = made;
  });

  const authHandle = withPassword(OWNER);
  const read = async (nvIndex: NvEntity, size: number) =>
    (await tpm.run(NV_Read, { authHandle, nvIndex }, { size, offset: 0 })).data;
  const write = (nvIndex: NvEntity) =>
    tpm.run(NV_Write, { authHandle, nvIndex }, { data: Buffer.from('data'), offset: 0 });

  it('NV_Extend folds into an index of its type, through a session whose Name follows WRITTEN', async () => {
    const event = randomBytes(50);
    await withNv(tpm, { attributes: OPEN | N.EXTEND, size: 32 }, async (fresh, current) => {
      await inSession(tpm, { kind: 'hmac' }, async (session) => {
        const by = withSession(OWNER, session);
        await tpm.run(NV_Extend, { authHandle: by, nvIndex: fresh }, { data: event });
        await assert.rejects(
          tpm.run(NV_Extend, { authHandle: by, nvIndex: fresh }, { data: event }),
          says('AUTH_FAIL', 'BAD_AUTH'),
          'the old Name',
        );
        const first = createHash('sha256').update(Buffer.alloc(32)).update(event).digest();
        assert.deepEqual(await read(await current(), 32), first);
        await tpm.run(NV_Extend, { authHandle: by, nvIndex: await current() }, { data: event });
        assert.deepEqual(
          await read(await current(), 32),
          createHash('sha256').update(first).update(event).digest(),
        );
      });
    });
    await withNv(tpm, { attributes: OPEN, size: 32 }, (fresh) =>
      assert.rejects(tpm.run(NV_Extend, { authHandle, nvIndex: fresh }, { data: event }), says('ATTRIBUTES')),
    );
  });

  it('NV_SetBits sets 64 bits, and never clears one', async () => {
    await withNv(tpm, { attributes: OPEN | N.BITS, size: 8 }, async (fresh, current) => {
      for (const [bits, all] of [
        [0x8000_0000_0000_0000n, 0x8000_0000_0000_0000n],
        [0x1_0000_0001n, 0x8000_0001_0000_0001n],
        [0n, 0x8000_0001_0000_0001n],
      ] as const) {
        await tpm.run(NV_SetBits, { authHandle, nvIndex: fresh }, { bits });
        assert.equal((await read(await current(), 8)).readBigUInt64BE(), all);
      }
      await assert.rejects(write(fresh), says('ATTRIBUTES'));
    });
    await withNv(tpm, { attributes: OPEN, size: 8 }, (fresh) =>
      assert.rejects(tpm.run(NV_SetBits, { authHandle, nvIndex: fresh }, { bits: 1n }), says('ATTRIBUTES')),
    );
  });

  it('NV_WriteLock and NV_GlobalWriteLock end writing, NV_ReadLock reading', async () => {
    await withNv(tpm, { attributes: OPEN | N.WRITE_STCLEAR, size: 4 }, async (fresh, current) => {
      await write(fresh);
      const nvIndex = await current();
      await tpm.run(NV_WriteLock, { authHandle, nvIndex }, {});
      await assert.rejects(write(nvIndex), says('NV_LOCKED'));
      assert.equal((await read(nvIndex, 4)).toString(), 'data');
      assert.ok(((await current()).nvPublic.value.attributes & N.WRITELOCKED) !== 0);
    });
    await withNv(tpm, { attributes: OPEN | N.GLOBALLOCK, size: 4 }, async (fresh) => {
      await write(fresh);
      await tpm.run(NV_GlobalWriteLock, { authHandle }, {});
      await assert.rejects(write(fresh), says('NV_LOCKED'));
    });
    await withNv(tpm, { attributes: mask(OPEN, N.READ_STCLEAR), size: 4 }, async (fresh, current) => {
      await write(fresh);
      const nvIndex = await current();
      await tpm.run(NV_ReadLock, { authHandle, nvIndex }, {});
      await assert.rejects(read(nvIndex, 4), says('NV_LOCKED'));
    });
    await withNv(tpm, { attributes: OPEN, size: 4 }, async (nvIndex) => {
      await assert.rejects(tpm.run(NV_WriteLock, { authHandle, nvIndex }, {}), says('ATTRIBUTES'));
      await assert.rejects(tpm.run(NV_ReadLock, { authHandle, nvIndex }, {}), says('ATTRIBUTES'));
    });
    await assert.rejects(
      tpm.run(NV_GlobalWriteLock, { authHandle: withPassword({ ...OWNER, handle: 0x4000000a }) }, {}),
      says('VALUE', 'HIERARCHY'),
    );
  });

  it('NV_ChangeAuth: the answer is proved with the new authValue', async () => {
    const steps = [{ assert: 'command-code', code: NV_ChangeAuth.code }, { assert: 'auth-value' }] as const;
    const [auth, newAuth] = [randomBytes(16), Buffer.from('ab00cd00', 'hex')];
    const attributes = N.AUTHWRITE | N.AUTHREAD | N.NO_DA;
    await withNv(tpm, { attributes, size: 4, auth, policy: policyDigest(steps) }, async (index) => {
      await inSession(tpm, { kind: 'policy' }, async (session) => {
        const change = async (of: NvEntity) => {
          await runPolicy(tpm, session, steps);
          await tpm.run(NV_ChangeAuth, { nvIndex: withSession(of, session) }, { newAuth });
        };
        await change(index);
        await assert.rejects(change(index), says('AUTH_FAIL', 'BAD_AUTH'), 'the old authValue');
        await change(nvEntity(index.nvPublic, newAuth));
      });
    });
  });
});
