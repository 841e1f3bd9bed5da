import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import {
  Create,
  embed,
  flush,
  Ht,
  listHandles,
  NV_DefineSpace,
  NV_Read,
  NV_UndefineSpace,
  NV_Write,
  NvAttribute,
  nvEntity,
  permanent,
  Rh,
  readNvIndex,
  StartAuthSession,
  type Tpm,
  tpmsNvPublic,
  Unseal,
  withPassword,
} from 'tpm2-ts-bindings';
import { type NvIndexRef, type RootTpmEnrolment, rootKeyFromInputs } from 'vtpm-manager/root-tpm/index';
import {
  aboutIndex,
  commandCode,
  denied,
  disguised,
  startRecordingProxy,
} from '../support/recording-proxy.js';
import { Chip, ENROL, INSTALLATION, refuses } from './root-tpm-fixture.js';

describe('manager: generations of the root key', () => {
  const chip = new Chip();
  const owner = withPassword(permanent(Rh.OWNER));
  const release = (enrolment: RootTpmEnrolment) => chip.root((tpm) => tpm.releaseRootKey(enrolment));
  const indices = () => chip.direct((tpm) => listHandles(tpm, Ht.NV_INDEX));

  it('both open until the old one is erased, and then only the new one', async () => {
    const first = await chip.enrol();
    const second = await chip.root((tpm) => tpm.nextGeneration(first.enrolment));
    assert.deepEqual(
      [first, second].map(({ enrolment }) => enrolment.root.generation),
      [1, 2],
    );
    assert.notDeepEqual(second.rootKey, first.rootKey);
    assert.deepEqual(await release(first.enrolment), first.rootKey, 'positive control: it opens before');
    assert.deepEqual(await release(second.enrolment), second.rootKey);

    const erase = () => chip.root((tpm) => tpm.eraseGeneration(second.enrolment, first.enrolment.root));
    assert.equal(await erase(), 'removed');
    assert.equal(await erase(), 'gone', 'a repetition does no harm');
    await assert.rejects(release(first.enrolment), refuses('tpm-emptied'));
    assert.deepEqual(await release(second.enrolment), second.rootKey);
    await assert.rejects(
      chip.root((tpm) => tpm.eraseGeneration(second.enrolment, second.enrolment.root)),
      refuses('bad-request', /needed/),
    );
  });

  it('the old sealed blob is worthless after it, whatever is put in place of its half', async () => {
    const first = await chip.enrol();
    const second = await chip.root((tpm) => tpm.nextGeneration(first.enrolment));
    const nvIndex = await chip.direct((tpm) => readNvIndex(tpm, first.enrolment.root.nvHandle));
    const bus = await startRecordingProxy(chip.swtpm.socket);
    await chip.root((tpm) => tpm.eraseGeneration(second.enrolment, first.enrolment.root), bus.path);
    // Overwritten before it is undefined: the space alone would keep what was in it.
    const erasing = bus.commands.map(commandCode);
    const at = erasing.indexOf(NV_UndefineSpace.code);
    assert.ok(at > 0 && erasing.lastIndexOf(NV_Write.code, at) >= 0);
    await bus.close();
    // The owner defines an index of the same Name, with a content of his own.
    assert.ok(nvIndex);
    await chip.direct(async (tpm) => {
      const { value } = nvIndex.nvPublic;
      const fresh = embed(tpmsNvPublic, { ...value, attributes: value.attributes & ~NvAttribute.WRITTEN });
      await tpm.run(NV_DefineSpace, { authHandle: owner }, { auth: Buffer.alloc(0), publicInfo: fresh });
      const params = { data: randomBytes(32), offset: 0 };
      await tpm.run(NV_Write, { authHandle: owner, nvIndex: nvEntity(fresh) }, params);
    });
    const opened = await release(first.enrolment);
    assert.notDeepEqual(opened, first.rootKey, 'the secret comes out, the key does not');
    assert.deepEqual(await release(second.enrolment), second.rootKey);
  });

  it('I-7 a rotation shows no secret on the bus', async () => {
    const { enrolment } = await chip.enrol();
    const bus = await startRecordingProxy(chip.swtpm.socket);
    try {
      const next = await chip.root((tpm) => tpm.nextGeneration(enrolment), bus.path);
      assert.ok(bus.commands.some((command) => commandCode(command) === NV_Write.code));
      for (const half of [
        next.recoveryInputs.subarray(0, 32),
        next.recoveryInputs.subarray(32),
        next.rootKey,
      ]) {
        for (let at = 0; at + 8 <= half.length; at++) assert.equal(bus.saw(half.subarray(at, at + 8)), false);
      }
    } finally {
      await bus.close();
    }
  });

  it('another selection of registers is another generation', async () => {
    const first = await chip.enrol();
    const policy = { kind: 'fixed', pcrSelection: 'sha256:4' } as const;
    const second = await chip.root((tpm) => tpm.nextGeneration(first.enrolment, { policy }));
    assert.equal(second.enrolment.root.pcrSelection, 'sha256:4');
    await chip.extend(7);
    await assert.rejects(release(first.enrolment), refuses('platform-policy', /PCR sha256:7/));
    assert.deepEqual(await release(second.enrolment), second.rootKey);
    await chip.extend(4);
    await assert.rejects(release(second.enrolment), refuses('platform-policy', /PCR sha256:4/));
  });

  it('the recovery inputs give the key without a chip', async () => {
    const first = await chip.enrol();
    const second = await chip.root((tpm) => tpm.nextGeneration(first.enrolment));
    for (const { recoveryInputs, rootKey } of [first, second]) {
      assert.equal(recoveryInputs.length, 64);
      assert.deepEqual(rootKeyFromInputs(recoveryInputs, INSTALLATION), rootKey);
      assert.notDeepEqual(rootKeyFromInputs(recoveryInputs, randomBytes(16)), rootKey);
    }
    assert.throws(() => rootKeyFromInputs(first.rootKey, INSTALLATION), refuses('bad-request'));
  });

  it('a crash at any command leaves what can be repeated and cleaned up', async function () {
    this.timeout(120_000);
    const first = await chip.enrol();
    const before = await indices();
    for (const { code, name } of [StartAuthSession, Create, NV_DefineSpace, NV_Write, Unseal, NV_Read]) {
      for (const when of ['before', 'after'] as const) {
        const planned: NvIndexRef[] = [];
        const bus = await cut(code, when);
        await assert.rejects(
          chip.root(
            (tpm) =>
              tpm.nextGeneration(first.enrolment, {
                beforeDefine: (refs) => void planned.push(...refs),
              }),
            bus.path,
          ),
          refuses('tpm-unreachable'),
          `${when} ${name}`,
        );
        await bus.close();
        await chip.direct(flushAll);
        // The next start: the old generation opens, what was planned is removed, the rotation is done again.
        assert.deepEqual(await release(first.enrolment), first.rootKey);
        await chip.root((tpm) => tpm.eraseIndices(first.enrolment, planned));
        assert.deepEqual(await indices(), before, `${when} ${name}`);
        const { enrolment } = await chip.root((tpm) => tpm.nextGeneration(first.enrolment));
        await chip.root((tpm) => tpm.eraseGeneration(first.enrolment, enrolment.root));
      }
    }
  });

  it('an erasure that was interrupted is repeated', async () => {
    const first = await chip.enrol();
    for (const { code, name } of [NV_Write, NV_UndefineSpace]) {
      for (const when of ['before', 'after'] as const) {
        const old = await chip.root((tpm) => tpm.nextGeneration(first.enrolment));
        const bus = await cut(code, when);
        await assert.rejects(
          chip.root((tpm) => tpm.eraseGeneration(first.enrolment, old.enrolment.root), bus.path),
          refuses('tpm-unreachable'),
          `${when} ${name}`,
        );
        await bus.close();
        await chip.direct(flushAll);
        await chip.root((tpm) => tpm.eraseGeneration(first.enrolment, old.enrolment.root));
        assert.equal((await indices()).includes(old.enrolment.root.nvHandle), false);
      }
    }
    assert.deepEqual(await release(first.enrolment), first.rootKey);
  });

  it('an index that the bus says is gone is not taken for erased', async () => {
    const first = await chip.enrol();
    const second = await chip.root((tpm) => tpm.nextGeneration(first.enrolment));
    const { nvHandle } = first.enrolment.root;
    const erase = (path?: string) =>
      chip.root((tpm) => tpm.eraseGeneration(second.enrolment, first.enrolment.root), path);
    for (const lie of [denied, disguised]) {
      const bus = await startRecordingProxy(chip.swtpm.socket, aboutIndex(nvHandle, lie));
      await assert.rejects(erase(bus.path), refuses('tpm-fault', /not so/));
      await bus.close();
      assert.ok((await indices()).includes(nvHandle));
      assert.deepEqual(await release(first.enrolment), first.rootKey, 'it was not erased');
    }
    assert.equal(await erase(), 'removed');
    assert.equal(await erase(), 'gone');
  });

  it('removes nothing of another Name', async () => {
    const first = await chip.enrol();
    const second = await chip.root((tpm) => tpm.nextGeneration(first.enrolment));
    const elsewhere = await chip.enrol({ installation: randomBytes(16) });
    const before = await indices();
    const mistaken = { ...first.enrolment.root, nvHandle: elsewhere.enrolment.root.nvHandle };
    assert.equal(await chip.root((tpm) => tpm.eraseGeneration(second.enrolment, mistaken)), 'other');
    assert.deepEqual(await indices(), before);
  });

  it('withdraw removes all that the enrolment names, and nothing of another installation', async () => {
    const other = await chip.enrol({ installation: randomBytes(16) });
    const before = await indices();
    const { enrolment, leftovers } = await chip.enrol();
    assert.deepEqual(leftovers, before);
    const { removed } = await chip.root((tpm) => tpm.withdraw(enrolment, { evict: false }));
    assert.equal(removed.length, 3, removed.join());
    assert.deepEqual(await indices(), before);
    assert.deepEqual(await release(other.enrolment), other.rootKey);
  });

  it('withdraw believes no absence that the bus made up, and says what it cannot prove', async () => {
    const { enrolment } = await chip.enrol();
    const bus = await startRecordingProxy(chip.swtpm.socket, aboutIndex(enrolment.root.nvHandle, denied));
    const withdraw = (path?: string) => chip.root((tpm) => tpm.withdraw(enrolment, { evict: true }), path);
    await assert.rejects(withdraw(bus.path), refuses('tpm-fault', /not so/));
    await bus.close();
    const first = await withdraw();
    assert.equal(first.removed.length, 4, first.removed.join());
    const again = await withdraw();
    assert.deepEqual(again.removed, []);
    assert.match(again.left.join('\n'), /cannot be proved without .*storage root key/);
  });

  it('a full TPM is said to be full, and nothing is left in it', async () => {
    const before = await indices();
    let defined = 0;
    const isFull = (command: Buffer): boolean =>
      commandCode(command) === NV_DefineSpace.code && ++defined === 3;
    let replaced = false;
    const bus = await startRecordingProxy(chip.swtpm.socket, {
      command: (message) => {
        replaced = isFull(message);
        // GetRandom of 8 bytes, so that the TPM has something to answer.
        return replaced ? Buffer.from('80010000000c0000017b0008', 'hex') : message;
      },
      response: (message) => (replaced ? Buffer.from('80010000000a0000014b', 'hex') : message),
    });
    try {
      await assert.rejects(
        chip.root((tpm) => tpm.enrol(ENROL), bus.path),
        refuses('tpm-unfit', /no NV space/),
      );
    } finally {
      await bus.close();
    }
    assert.equal(defined, 3);
    assert.deepEqual(await indices(), before);
  });

  /** A bus on which the connection ends at the first command of a kind, before or after the TPM executed it. */
  function cut(code: number, when: 'before' | 'after') {
    return startRecordingProxy(chip.swtpm.socket, {
      command: (message) => (when === 'before' && commandCode(message) === code ? undefined : message),
      response: (message, command) =>
        when === 'after' && commandCode(command) === code ? undefined : message,
    });
  }
});

/** What a process that was killed left loaded; a resource manager removes it. */
async function flushAll(tpm: Tpm): Promise<void> {
  for (const type of [Ht.TRANSIENT, Ht.HMAC_SESSION, Ht.POLICY_SESSION]) {
    for (const handle of await listHandles(tpm, type)) await flush(tpm, handle);
  }
}
