import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import {
  ObjectAttribute as A,
  Alg,
  CreatePrimary,
  concat,
  decode,
  EvictControl,
  flush,
  Ht,
  inSession,
  Load,
  listHandles,
  NV_Read,
  NV_UndefineSpace,
  NV_Write,
  type ObjectEntity,
  objectEntity,
  permanent,
  publicArea,
  Rc,
  Rh,
  readObject,
  rsaSrkTemplate,
  runPolicy,
  StartAuthSession,
  srkTemplate,
  type Tpm,
  TpmError,
  tpmtPublic,
  Unseal,
  unnamed,
  withPassword,
  withSession,
} from 'tpm2-ts-bindings';
import {
  type EnrolOptions,
  openRootTpm,
  type RootTpm,
  type RootTpmEnrolment,
} from 'vtpm-manager/root-tpm/index';
import { deriveRootKey } from 'vtpm-manager/root-tpm/root-key';
import { commandCode, startRecordingProxy } from '../support/recording-proxy.js';
import { startSwtpm } from '../support/swtpm.js';
import { connectTpm, NOTHING } from '../support/tpm-fixture.js';
import { Chip, ENROL, halfOf, INSTALLATION, refuses, SRK, withLoaded } from './root-tpm-fixture.js';

describe('manager: root TPM', () => {
  const chip = new Chip();
  const direct = <T>(body: (tpm: Tpm) => Promise<T>) => chip.direct(body);
  const root = <T>(body: (root: RootTpm) => Promise<T>, path?: string) => chip.root(body, path);
  const enrol = (options?: Partial<EnrolOptions>) => chip.enrol(options);
  const extend = (pcr: number) => chip.extend(pcr);
  const release = (enrolment: RootTpmEnrolment) => root((tpm) => tpm.releaseRootKey(enrolment));

  it('the enrolled key is released again, after a restart of the TPM too', async () => {
    const { enrolment, rootKey } = await enrol();
    assert.equal(rootKey.length, 32);
    const kept = JSON.parse(JSON.stringify(enrolment)) as RootTpmEnrolment;
    assert.deepEqual(await release(kept), rootKey);
    await chip.swtpm.restart();
    assert.deepEqual(await release(kept), rootKey);
    assert.equal(enrolment.srkCreatedByUs, true);
    assert.equal(enrolment.manufacturer, 'IBM');
  });

  it('each enrolment has another key, and the installation enters it', async () => {
    const first = await enrol();
    const second = await enrol();
    assert.equal(second.enrolment.srkCreatedByUs, false, 'the SRK is used again');
    assert.notDeepEqual(first.rootKey, second.rootKey);
    assert.notEqual(first.enrolment.root.nvHandle, second.enrolment.root.nvHandle);
    const elsewhere = { ...first.enrolment, installation: randomBytes(16).toString('hex') };
    assert.notDeepEqual(await release(elsewhere), first.rootKey);
    assert.deepEqual(await release(first.enrolment), first.rootKey);
  });

  it('I-6 the chip refuses the root key when a PCR differs', async () => {
    const { enrolment, rootKey } = await enrol();
    await extend(16);
    assert.deepEqual(await release(enrolment), rootKey, 'a PCR that is not selected does not matter');
    await extend(7);
    await assert.rejects(
      release(enrolment),
      refuses('platform-policy', /: PCR sha256:7 is [0-9a-f]{16}… and was 0{16}… at enrolment\./),
    );
    // The refusal is the chip's: its answer to Unseal, and to NV_Read by itself.
    await assert.rejects(
      release(enrolment),
      (error: Error) => TpmError.is(error.cause, Rc.POLICY_FAIL) && /Unseal/.test(error.cause.message),
    );
    await direct(async (tpm) => {
      const index = await halfOf(tpm, enrolment);
      await inSession(tpm, { kind: 'policy' }, async (session) => {
        const selection = [{ hash: Alg.SHA256, pcrs: [0, 7] }];
        await runPolicy(tpm, session, [{ assert: 'pcr', selection }]);
        const authHandle = withSession(index, session);
        await assert.rejects(
          tpm.run(NV_Read, { authHandle, nvIndex: index }, { size: 32, offset: 0 }),
          (error) => TpmError.is(error, Rc.POLICY_FAIL),
        );
      });
    });
    // The values at a reset are those of enrolment.
    await chip.swtpm.restart();
    assert.deepEqual(await release(enrolment), rootKey);
  });

  it('I-6 another implementation gets the same refusal from the chip', async function () {
    this.timeout(120_000);
    const { enrolment, rootKey } = await enrol();
    const opened = await toolsUnseal(chip, enrolment);
    assert.equal(opened.failure, undefined, 'positive control: without a change tpm2_unseal succeeds');
    const half = await toolsNvRead(chip, enrolment);
    assert.equal(half.failure, undefined);
    assert.deepEqual(
      deriveRootKey(opened.data, half.data, INSTALLATION),
      rootKey,
      'and these are the halves',
    );

    await extend(7);
    assert.match((await toolsUnseal(chip, enrolment)).failure ?? '', /policy check failed|0x99d/i);
    assert.match((await toolsNvRead(chip, enrolment)).failure ?? '', /policy check failed|0x99d/i);
  });

  it('I-6 the empty authorisation does not open it', async () => {
    const { enrolment } = await enrol();
    const refused = (error: unknown) =>
      TpmError.is(error, Rc.AUTH_UNAVAILABLE, Rc.AUTH_FAIL, Rc.BAD_AUTH, Rc.POLICY_FAIL, Rc.NV_AUTHORIZATION);
    await direct(async (tpm) => {
      const index = await halfOf(tpm, enrolment);
      const range = { size: 32, offset: 0 };
      await withLoaded(tpm, enrolment, async (sealed) => {
        await assert.rejects(tpm.run(Unseal, { itemHandle: withPassword(sealed) }, {}), refused);
        await assert.rejects(
          tpm.run(NV_Read, { authHandle: withPassword(index), nvIndex: index }, range),
          refused,
        );
        await assert.rejects(
          tpm.run(NV_Read, { authHandle: withPassword(permanent(Rh.OWNER)), nvIndex: index }, range),
          refused,
          'the owner writes it and does not read it',
        );
        for (const kind of ['hmac', 'policy'] as const) {
          await inSession(tpm, { kind }, async (session) => {
            const itemHandle = withSession(sealed, session);
            await assert.rejects(tpm.run(Unseal, { itemHandle }, {}), refused, kind);
          });
        }
        // Positive control: the same calls do open an object whose authValue counts.
        const open = await sealWithAuth(tpm, Buffer.from('not much of a secret'));
        try {
          const { outData } = await tpm.run(Unseal, { itemHandle: withPassword(open) }, {});
          assert.equal(outData.toString(), 'not much of a secret');
        } finally {
          await flush(tpm, open.handle);
        }
      });
    });
  });

  it('I-7 the secret is in no byte on the bus', async () => {
    const bus = await startRecordingProxy(chip.swtpm.socket);
    try {
      const { enrolment, rootKey } = await root((tpm) => tpm.enrol(ENROL), bus.path);
      assert.deepEqual(await root((tpm) => tpm.releaseRootKey(enrolment), bus.path), rootKey);
      const captured = Buffer.concat([bus.sent(), bus.received()]);
      assert.ok(bus.commands.some((command) => commandCode(command) === Unseal.code));
      // Every session to the enrolled SRK is salted to it: without, the key would follow from nonces on the bus.
      const sessions = bus.commands.filter((command) => commandCode(command) === StartAuthSession.code);
      const salted = sessions.filter((command) => command.readUInt32BE(10) === SRK);
      assert.deepEqual([sessions.length, salted.length], [4, 3], 'the one before there is an SRK is not');

      // Positive control: the same capture of an unsalted, unencrypted session shows both halves.
      bus.forget();
      const tpm = await connectTpm(bus.path);
      let rootSecret: Buffer = NOTHING;
      let nvHalf: Buffer = NOTHING;
      const steps = [{ assert: 'pcr', selection: [{ hash: Alg.SHA256, pcrs: [0, 7] }] }] as const;
      await withLoaded(tpm, enrolment, (sealed) =>
        inSession(tpm, { kind: 'policy' }, async (session) => {
          await runPolicy(tpm, session, steps);
          rootSecret = (await tpm.run(Unseal, { itemHandle: withSession(sealed, session) }, {})).outData;
          const index = await halfOf(tpm, enrolment);
          await runPolicy(tpm, session, steps);
          const authHandle = withSession(index, session);
          nvHalf = (await tpm.run(NV_Read, { authHandle, nvIndex: index }, { size: 32, offset: 0 })).data;
        }),
      );
      await tpm.close();
      assert.equal(rootSecret.length + nvHalf.length, 64);
      assert.deepEqual(deriveRootKey(rootSecret, nvHalf, INSTALLATION), rootKey);
      for (const secret of [rootSecret, nvHalf]) {
        assert.equal(bus.saw(secret), true, 'the capture does show what is not encrypted');
        assert.equal(captured.includes(secret), false, 'enrolment and release showed it');
        // Not in part either: no eight bytes of it.
        for (let at = 0; at + 8 <= secret.length; at++) {
          assert.equal(captured.includes(secret.subarray(at, at + 8)), false);
        }
      }
      assert.equal(captured.includes(rootKey), false);
    } finally {
      await bus.close();
    }
  });

  it('a flipped bit in the answer to Unseal is refused', async () => {
    const { enrolment } = await enrol();
    for (const code of [Unseal.code, NV_Read.code, Load.code]) {
      const bus = await startRecordingProxy(chip.swtpm.socket, {
        response: (message, command) => {
          if (commandCode(command) === code) message[20] = (message[20] ?? 0) ^ 0x10;
          return message;
        },
      });
      try {
        await assert.rejects(
          root((tpm) => tpm.releaseRootKey(enrolment), bus.path),
          refuses('tpm-fault', /changed on its way/),
        );
      } finally {
        await bus.close();
      }
      // A load whose answer was changed leaves an object whose handle was never learned.
      if (code === Load.code) await direct(flushTransient);
    }
  });

  it('a substituted SRK is refused by its Name, before anything is salted to it', async () => {
    const { enrolment } = await enrol();
    await replaceSrk(rsaSrkTemplate());
    await assert.rejects(release(enrolment), refuses('tpm-changed', /not the enrolled one/));

    // An interposer that claims the right Name for his own key: the Name is computed from the public area.
    const bus = await startRecordingProxy(chip.swtpm.socket, {
      response: (message) => {
        const name = message.length - 70; // Before the qualified Name, 2 + 34 bytes.
        if (message.length > 300) Buffer.from(enrolment.srkName, 'hex').copy(message, name);
        return message;
      },
    });
    try {
      await assert.rejects(
        root((tpm) => tpm.releaseRootKey(enrolment), bus.path),
        refuses('tpm-fault', /Name and public area/),
      );
      const started = bus.commands.filter((command) => commandCode(command) === StartAuthSession.code);
      assert.equal(started.length, 0, 'no session was opened to the wrong key');
    } finally {
      await bus.close();
    }
  });

  it('an emptied TPM is named', async () => {
    const { enrolment } = await enrol();
    await direct(async (tpm) => {
      const index = await halfOf(tpm, enrolment);
      const authHandle = withPassword(permanent(Rh.OWNER));
      await tpm.run(NV_UndefineSpace, { authHandle, nvIndex: index }, {});
    });
    await assert.rejects(release(enrolment), refuses('tpm-emptied', /NV index/));
    await replaceSrk(undefined);
    await assert.rejects(release(enrolment), refuses('tpm-emptied', /0x81000001 is gone/));
  });

  it('overwriting the NV half erases the key for good', async () => {
    const { enrolment, rootKey } = await enrol();
    await direct(async (tpm) => {
      const index = await halfOf(tpm, enrolment);
      const authHandle = withPassword(permanent(Rh.OWNER));
      await tpm.run(NV_Write, { authHandle, nvIndex: index }, { data: randomBytes(32), offset: 0 });
    });
    assert.notDeepEqual(await release(enrolment), rootKey);
  });

  it('a storage key that is there is used and never replaced', async () => {
    await makePersistent(rsaSrkTemplate());
    const name = await direct(async (tpm) => (await readObject(tpm, SRK))!.name);
    const { enrolment, rootKey } = await enrol();
    assert.equal(enrolment.srkCreatedByUs, false);
    assert.equal(enrolment.srkName, name.toString('hex'));
    assert.deepEqual(await release(enrolment), rootKey);
  });

  it('an object that cannot be the SRK is refused and left as it is', async () => {
    const srk = srkTemplate().value;
    assert.equal(srk.type, Alg.ECC);
    const signing = {
      ...srk,
      objectAttributes: (srk.objectAttributes & ~(A.decrypt | A.restricted)) | A.sign,
      parameters: { ...srk.parameters, symmetric: { algorithm: Alg.NULL } },
    };
    const movable = { ...srk, objectAttributes: srk.objectAttributes & ~(A.fixedTPM | A.fixedParent) };
    for (const [template, auth, text] of [
      [signing, NOTHING, /not a storage key/],
      [movable, NOTHING, /could leave this TPM/],
      [srk, Buffer.from('password'), /has a password/],
    ] as const) {
      await makePersistent(publicArea(template), auth);
      const before = await direct(async (tpm) => (await readObject(tpm, SRK))!.name);
      await assert.rejects(enrol(), refuses('tpm-unfit', text));
      await assert.rejects(enrol(), refuses('tpm-unfit', /--srk-handle/));
      assert.deepEqual(await direct(async (tpm) => (await readObject(tpm, SRK))!.name), before);
      assert.deepEqual(await direct((tpm) => listHandles(tpm, Ht.NV_INDEX)), []);
      await replaceSrk(undefined);
    }
    // Another handle is free.
    await makePersistent(publicArea(signing));
    const { enrolment } = await enrol({ srkHandle: 0x81000002 });
    assert.equal(enrolment.srkHandle, 0x81000002);
  });

  it('options that make no sense are refused before the TPM is changed', async () => {
    await assert.rejects(enrol({ pcrSelection: 'sha256:99' }), refuses('bad-request'));
    await assert.rejects(enrol({ pcrSelection: 'sha1:7' }), refuses('bad-request', /SHA-1/));
    await assert.rejects(enrol({ srkHandle: 0x81800000 }), refuses('bad-request'));
    await assert.rejects(
      enrol({ ownerAuth: Buffer.from('wrong') }),
      refuses('bad-request', /owner password/),
    );
    assert.deepEqual(await direct((tpm) => listHandles(tpm, Ht.PERSISTENT)), []);
  });

  it('an owner password is used and never sent', async () => {
    const ownerAuth = Buffer.from('owner\0 of the chip');
    await chip.tools(tmpdir(), 'tpm2_changeauth', '-c', 'owner', `hex:${ownerAuth.toString('hex')}`);
    const bus = await startRecordingProxy(chip.swtpm.socket);
    try {
      const { enrolment, rootKey } = await root((tpm) => tpm.enrol({ ...ENROL, ownerAuth }), bus.path);
      assert.equal(bus.saw(ownerAuth), false);
      assert.deepEqual(await root((tpm) => tpm.releaseRootKey(enrolment), bus.path), rootKey);
      await assert.rejects(
        root((tpm) => tpm.enrol(ENROL), bus.path),
        refuses('bad-request', /owner password/),
      );
    } finally {
      await bus.close();
    }
    assert.equal(
      (await direct((tpm) => listHandles(tpm, Ht.NV_INDEX))).length,
      3,
      'the failed one left nothing',
    );
  });

  it('a damaged enrolment is refused, a newer one by name', async () => {
    const { enrolment } = await enrol();
    const damage = (base64: string): string => {
      const bytes = Buffer.from(base64, 'base64');
      bytes[bytes.length - 1] = bytes[bytes.length - 1]! ^ 1;
      return bytes.toString('base64');
    };
    for (const change of [
      { sealedPrivate: damage(enrolment.root.sealedPrivate) },
      { sealedPublic: damage(enrolment.root.sealedPublic) },
      { sealedPublic: 'AAAA' },
      { policyDigest: '00'.repeat(32) },
    ]) {
      await assert.rejects(
        release({ ...enrolment, root: { ...enrolment.root, ...change } }),
        refuses('tpm-fault'),
        JSON.stringify(change),
      );
    }
    await assert.rejects(release({ ...enrolment, format: 3 as 2 }), refuses('newer-format'));
    await assert.rejects(release({ ...enrolment, format: 1 as 2 }), refuses('older-format', /init again/));
  });

  it('an enrolled object that a password would open is refused', async () => {
    const { enrolment } = await enrol();
    const bytes = Buffer.from(enrolment.root.sealedPublic, 'base64');
    const value = decode(tpmtPublic, bytes);
    const open = publicArea({ ...value, objectAttributes: value.objectAttributes | A.userWithAuth });
    const root = { ...enrolment.root, sealedPublic: open.bytes.toString('base64') };
    const changed = { ...enrolment, root };
    await assert.rejects(release(changed), refuses('tpm-fault', /attributes are others/));
  });

  it('an enrolment that cannot be proved leaves no NV index', async () => {
    const bus = await startRecordingProxy(chip.swtpm.socket, {
      response: (message, command) => {
        if (commandCode(command) === Unseal.code) message[20] = (message[20] ?? 0) ^ 0x10;
        return message;
      },
    });
    try {
      await assert.rejects(
        root((tpm) => tpm.enrol(ENROL), bus.path),
        refuses('tpm-fault'),
      );
    } finally {
      await bus.close();
    }
    assert.deepEqual(await direct((tpm) => listHandles(tpm, Ht.NV_INDEX)), []);
  });

  it('a PCR extended between policy and use is tried again, not for ever', async () => {
    const { enrolment, rootKey } = await enrol();
    for (const [times, outcome] of [
      [2, 'released'],
      [100, 'refused'],
    ] as const) {
      let left = times;
      let replaced = false;
      // The TPM gets another command in place of Unseal, and the client the answer to a PCR that changed.
      const bus = await startRecordingProxy(chip.swtpm.socket, {
        command: (message) => {
          replaced = commandCode(message) === Unseal.code && left-- > 0;
          return replaced ? Buffer.from('80010000000c0000017b0008', 'hex') : message;
        },
        response: (message) => (replaced ? Buffer.from('80010000000a00000128', 'hex') : message),
      });
      try {
        const released = root((tpm) => tpm.releaseRootKey(enrolment), bus.path);
        if (outcome === 'released') assert.deepEqual(await released, rootKey);
        else await assert.rejects(released, refuses('platform-policy'));
      } finally {
        await bus.close();
      }
    }
  });

  it('Startup is sent where a software TPM waits for it', async () => {
    await chip.swtpm.stop();
    chip.swtpm = await startSwtpm({ flags: 'not-need-init' });
    const { enrolment, rootKey } = await enrol();
    assert.deepEqual(await release(enrolment), rootKey);
  });

  it('what a killed manager left in the embedded TPM is removed at the next start', async () => {
    await direct(async (tpm) => {
      const made = await makeTransient(tpm, srkTemplate());
      assert.deepEqual(await listHandles(tpm, Ht.TRANSIENT), [made.handle]);
    });
    const opened = await openRootTpm({ kind: 'embedded', path: chip.swtpm.socket });
    await opened.close();
  });

  it('a TPM that is gone is unreachable, not changed', async () => {
    const { enrolment } = await enrol();
    const opened = await openRootTpm({ kind: 'unix', path: chip.swtpm.socket });
    await chip.swtpm.kill();
    await assert.rejects(opened.releaseRootKey(enrolment), refuses('tpm-unreachable'));
    await opened.close();
    await assert.rejects(release(enrolment), refuses('tpm-unreachable'));
    await assert.rejects(
      openRootTpm({ kind: 'device', path: '/dev/no-such-tpm' }),
      refuses('tpm-unreachable'),
    );
  });

  it('calls at the same time take turns', async () => {
    const { enrolment, rootKey } = await enrol();
    await root(async (tpm) => {
      const keys = await Promise.all([1, 2, 3].map(() => tpm.releaseRootKey(enrolment)));
      for (const key of keys) assert.deepEqual(key, rootKey);
    });
  });

  async function makePersistent(
    template: ReturnType<typeof srkTemplate>,
    auth: Buffer = NOTHING,
  ): Promise<void> {
    await direct(async (tpm) => {
      const object = await makeTransient(tpm, template, auth);
      const owner = withPassword(permanent(Rh.OWNER));
      await tpm.run(EvictControl, { auth: owner, objectHandle: object }, { persistentHandle: SRK });
      await flush(tpm, object.handle);
    });
  }

  /** Takes what is at the SRK's handle away and puts another primary there. */
  async function replaceSrk(template: ReturnType<typeof srkTemplate> | undefined): Promise<void> {
    await direct(async (tpm) => {
      const auth = withPassword(permanent(Rh.OWNER));
      await tpm.run(EvictControl, { auth, objectHandle: unnamed(SRK) }, { persistentHandle: SRK });
    });
    if (template !== undefined) await makePersistent(template);
  }
});

async function makeTransient(
  tpm: Tpm,
  template: ReturnType<typeof srkTemplate>,
  userAuth: Buffer = NOTHING,
  data: Buffer = NOTHING,
): Promise<ObjectEntity> {
  const made = await tpm.run(
    CreatePrimary,
    { primaryHandle: withPassword(permanent(Rh.OWNER)) },
    { inSensitive: { userAuth, data }, inPublic: template, outsideInfo: NOTHING, creationPCR: [] },
  );
  return objectEntity(made.objectHandle, made.outPublic, userAuth);
}

/** The positive control's object: like the sealed one, but its authValue opens it. */
function sealWithAuth(tpm: Tpm, data: Buffer): Promise<ObjectEntity> {
  const template = publicArea({
    type: Alg.KEYEDHASH,
    nameAlg: Alg.SHA256,
    objectAttributes: A.fixedTPM | A.fixedParent | A.noDA | A.userWithAuth,
    authPolicy: NOTHING,
    parameters: { scheme: { scheme: Alg.NULL } },
    unique: NOTHING,
  });
  return makeTransient(tpm, template, NOTHING, data);
}

async function flushTransient(tpm: Tpm): Promise<void> {
  for (const handle of await listHandles(tpm, Ht.TRANSIENT)) await flush(tpm, handle);
}

interface ToolsResult {
  readonly data: Buffer;
  /** What the tool printed where it failed. */
  readonly failure: string | undefined;
}

/** Runs `body` with a directory and a policy session of tpm2-tools on the enrolled PCRs; both are gone after it. */
async function withToolsPolicy(
  chip: Chip,
  enrolment: RootTpmEnrolment,
  body: (directory: string) => Promise<Buffer>,
): Promise<ToolsResult> {
  const directory = mkdtempSync(join(tmpdir(), 'vtpm-tools-'));
  try {
    await chip.tools(directory, 'tpm2_startauthsession', '--policy-session', '-S', 'session');
    try {
      await chip.tools(directory, 'tpm2_policypcr', '-S', 'session', '-l', enrolment.root.pcrSelection);
      return { data: await body(directory), failure: undefined };
    } catch (error) {
      return { data: NOTHING, failure: `${(error as { stderr?: string }).stderr ?? error}` };
    } finally {
      await chip.tools(directory, 'tpm2_flushcontext', 'session');
      await chip.tools(directory, 'tpm2_flushcontext', '-t');
    }
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
}

function toolsUnseal(chip: Chip, enrolment: RootTpmEnrolment): Promise<ToolsResult> {
  return withToolsPolicy(chip, enrolment, async (directory) => {
    // tpm2-tools keep TPM2B structures: the size in front.
    for (const [name, base64] of [
      ['sealed.pub', enrolment.root.sealedPublic],
      ['sealed.priv', enrolment.root.sealedPrivate],
    ] as const) {
      const bytes = Buffer.from(base64, 'base64');
      writeFileSync(join(directory, name), concat(Buffer.of(bytes.length >> 8, bytes.length & 0xff), bytes));
    }
    const parent = `0x${enrolment.srkHandle.toString(16)}`;
    const files = ['-u', 'sealed.pub', '-r', 'sealed.priv', '-c', 'sealed.ctx'];
    await chip.tools(directory, 'tpm2_load', '-C', parent, ...files);
    // Without a resource manager the load stays in its slot beside the saved context.
    await chip.tools(directory, 'tpm2_flushcontext', '-t');
    await chip.tools(directory, 'tpm2_unseal', '-c', 'sealed.ctx', '-p', 'session:session', '-o', 'out');
    return readFileSync(join(directory, 'out'));
  });
}

function toolsNvRead(chip: Chip, enrolment: RootTpmEnrolment): Promise<ToolsResult> {
  return withToolsPolicy(chip, enrolment, async (directory) => {
    const index = `0x${enrolment.root.nvHandle.toString(16)}`;
    await chip.tools(directory, 'tpm2_nvread', index, '-C', index, '-P', 'session:session', '-o', 'out');
    return readFileSync(join(directory, 'out'));
  });
}
