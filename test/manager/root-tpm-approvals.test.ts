import assert from 'node:assert/strict';
import { createHash, generateKeyPairSync, type KeyObject, randomBytes } from 'node:crypto';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import {
  type Approval,
  type ApprovalRequest,
  authorityPublic,
  authorizeStep,
  concat,
  flush,
  Ht,
  inSession,
  LoadExternal,
  listHandles,
  NV_Increment,
  NV_Read,
  NV_UndefineSpace,
  objectEntity,
  PolicyAuthorize,
  permanent,
  Rc,
  Rh,
  readNvIndex,
  runPolicy,
  type Session,
  signApproval,
  type Tpm,
  TpmError,
  Unseal,
  VerifySignature,
  withPassword,
  withSession,
} from 'tpm2-ts-bindings';
import {
  isApproved,
  type NewGeneration,
  type PlatformState,
  type RootTpmEnrolment,
  requestApproval,
} from 'vtpm-manager/root-tpm/index';
import { REVOCATION_SHAPE } from 'vtpm-manager/root-tpm/nv-counter';
import { writtenEntity } from 'vtpm-manager/root-tpm/nv-index';
import { deriveRootKey } from 'vtpm-manager/root-tpm/root-key';
import { commandCode, startRecordingProxy } from '../support/recording-proxy.js';
import { Chip, halfOf, INSTALLATION, PCRS, refuses, withLoaded } from './root-tpm-fixture.js';

interface Pair {
  readonly publicKey: string;
  readonly privateKey: string;
}
const pem = ({ publicKey, privateKey }: { publicKey: KeyObject; privateKey: KeyObject }): Pair => ({
  publicKey: publicKey.export({ type: 'spki', format: 'pem' }) as string,
  privateKey: privateKey.export({ type: 'pkcs8', format: 'pem' }) as string,
});
const AUTHORITY = pem(generateKeyPairSync('ec', { namedCurve: 'P-256' }));
const STRANGER = pem(generateKeyPairSync('ec', { namedCurve: 'P-256' }));
const PURPOSE = 'vtpm.v1 platform root key';
/** What the next boot measures. */
const NEXT = createHash('sha256').update('firmware 2').digest();

const request = (
  enrolment: RootTpmEnrolment,
  state: PlatformState,
  label: string,
  counter = state.counter,
): ApprovalRequest =>
  requestApproval(enrolment, {
    label,
    pcrSelection: PCRS,
    pcrs: state.pcrs,
    counter,
    createdAt: new Date(),
  });

/** The values after an extend, as firmware that is known beforehand will make it. */
const predicted = ({ pcrs, counter }: PlatformState, pcr: string, digest: Buffer): PlatformState => {
  const before = Buffer.from(pcrs[pcr] ?? '', 'hex');
  const after = createHash('sha256').update(before).update(digest).digest('hex');
  return { pcrs: { ...pcrs, [pcr]: after }, counter };
};

describe('manager: root TPM under an authority', () => {
  const chip = new Chip();

  /** An installation that adopted the authority: as an operator does it, from the fixed policy of init. */
  async function adopt(
    pair = AUTHORITY,
    scheme?: 'rsassa' | 'rsapss',
  ): Promise<NewGeneration & { now: PlatformState; approval: Approval }> {
    const first = await chip.enrol();
    return chip.root(async (tpm) => {
      const now = await tpm.readPlatformState(first.enrolment);
      const approval = signApproval(
        request(first.enrolment, now, 'firmware 1'),
        pair.privateKey,
        scheme && { scheme },
      );
      const next = await tpm.nextGeneration(first.enrolment, {
        policy: {
          kind: 'authority',
          authority: pair.publicKey,
          pcrSelection: PCRS,
        },
        approvals: [approval],
      });
      assert.equal(await tpm.eraseGeneration(next.enrolment, first.enrolment.root), 'removed');
      return { ...next, now, approval };
    });
  }

  const release = (enrolment: RootTpmEnrolment, approvals: readonly Approval[]) =>
    chip.root((tpm) => tpm.releaseRootKey(enrolment, approvals));

  it('I-6 releases under an approval, and under no other values; the next ones are approved ahead', async () => {
    const { enrolment, rootKey, now, approval } = await adopt();
    assert.equal(JSON.stringify(enrolment).includes('PRIVATE'), false);
    assert.deepEqual(await release(enrolment, [approval]), rootKey);
    await assert.rejects(
      release(enrolment, []),
      refuses('platform-policy', /no approval .*vtpmctl platform approve/),
    );
    const ahead = signApproval(
      request(enrolment, predicted(now, 'sha256:7', NEXT), 'firmware 2'),
      AUTHORITY.privateKey,
    );
    assert.deepEqual(await release(enrolment, [ahead, approval]), rootKey, 'the other one is not for now');

    await chip.extend(7, NEXT);
    await assert.rejects(
      release(enrolment, [approval]),
      refuses(
        'platform-policy',
        /PCR sha256:7 is [0-9a-f]{16}… and was 0{16}… approved as "firmware 1"\. .*vtpmctl platform approve/,
      ),
    );
    assert.deepEqual(await release(enrolment, [approval, ahead]), rootKey);
    await chip.extend(0);
    await assert.rejects(
      release(enrolment, [approval, ahead]),
      refuses(
        'platform-policy',
        /PCR sha256:0 is .* approved as "firmware 2" \(the closest of 2 approvals\)/,
      ),
    );
    await chip.swtpm.restart();
    assert.deepEqual(await release(enrolment, [approval, ahead]), rootKey);
  });

  it('takes P-256, P-384, RSA 2048 and RSA 3072, with RSASSA and RSAPSS', async function () {
    this.timeout(120_000);
    const rsa = (modulusLength: number) => pem(generateKeyPairSync('rsa', { modulusLength }));
    for (const [pair, scheme] of [
      [pem(generateKeyPairSync('ec', { namedCurve: 'P-384' })), undefined],
      [rsa(2048), 'rsassa'],
      [rsa(2048), 'rsapss'],
      [rsa(3072), 'rsapss'],
    ] as const) {
      const { enrolment, rootKey, approval } = await adopt(pair, scheme);
      assert.deepEqual(await release(enrolment, [approval]), rootKey);
    }
    const small = pem(generateKeyPairSync('rsa', { modulusLength: 1024 }));
    await assert.rejects(adopt(small), /P-256 or P-384, or of RSA 2048 or 3072 bits/);
  });

  it('I-6 a revoked approval stays dead, on an old disk too', async () => {
    const { enrolment, rootKey, now, approval } = await adopt();
    const lost = signApproval(
      request(enrolment, predicted(now, 'sha256:7', NEXT), 'lost laptop'),
      AUTHORITY.privateKey,
    );
    const survivor = signApproval(
      request(enrolment, now, 'firmware 1', now.counter + 1n),
      AUTHORITY.privateKey,
    );
    await assert.rejects(
      release(enrolment, [survivor]),
      refuses('platform-policy', /was not finished.*vtpmctl platform revoke/),
      'not before the counter moves',
    );
    // A crash before the counter moved leaves both in the file.
    assert.deepEqual(await release(enrolment, [survivor, approval]), rootKey);
    await chip.root(async (tpm) => {
      assert.equal(await tpm.incrementRevocationCounter(enrolment), now.counter + 1n);
      assert.equal(await tpm.readRevocationCounter(enrolment), now.counter + 1n);
    });
    assert.deepEqual(await release(enrolment, [survivor, approval]), rootKey);
    // The files as they were before the revocation.
    await assert.rejects(
      release(enrolment, [approval, lost]),
      refuses('platform-policy', /every approval of these PCR values was revoked, the last one "firmware 1"/),
    );
    await chip.extend(7, NEXT);
    await assert.rejects(
      release(enrolment, [survivor, approval, lost]),
      refuses(
        'platform-policy',
        /every approval of these PCR values was revoked, the last one "lost laptop"/,
      ),
    );
    await refusedByChip(enrolment, lost, Rc.POLICY);
  });

  it('I-6 the owner cannot bring a revoked approval back by making the counter anew', async () => {
    const { enrolment, rootKey, now, approval } = await adopt();
    const { handle } = enrolment.revocation;
    const owner = withPassword(permanent(Rh.OWNER));
    await chip.root((tpm) => tpm.incrementRevocationCounter(enrolment));
    await chip.direct(async (tpm) => {
      await tpm.run(NV_UndefineSpace, { authHandle: owner, nvIndex: (await readNvIndex(tpm, handle))! }, {});
    });
    await assert.rejects(release(enrolment, [approval]), refuses('tpm-emptied', /counts the revocations/));
    const define = async (attributes: string): Promise<void> => {
      const args = [`0x${handle.toString(16)}`, '-C', 'o', '-s', '8', '-a', attributes];
      await chip.tools(tmpdir(), 'tpm2_nvdefine', ...args);
    };
    // One that can be written, with the old value in it.
    await define('ownerwrite|authread|no_da');
    const directory = mkdtempSync(join(tmpdir(), 'vtpm-tools-'));
    const value = Buffer.alloc(8);
    value.writeBigUInt64BE(now.counter);
    writeFileSync(join(directory, 'value'), value);
    await chip.tools(directory, 'tpm2_nvwrite', `0x${handle.toString(16)}`, '-C', 'o', '-i', 'value');
    rmSync(directory, { recursive: true });
    await assert.rejects(release(enrolment, [approval]), refuses('tpm-changed', /counts the revocations/));
    await chip.tools(tmpdir(), 'tpm2_nvundefine', `0x${handle.toString(16)}`, '-C', 'o');
    // The same kind again has the same Name, and a value that never was.
    await define('ownerwrite|authread|no_da|nt=1');
    await chip.direct(async (tpm) => {
      await tpm.run(NV_Increment, { authHandle: owner, nvIndex: (await readNvIndex(tpm, handle))! }, {});
    });
    const counter = await chip.root((tpm) => tpm.readRevocationCounter(enrolment));
    assert.ok(counter > now.counter + 1n);
    await assert.rejects(release(enrolment, [approval]), refuses('platform-policy', /revoked/));
    const again = signApproval(request(enrolment, now, 'again', counter), AUTHORITY.privateKey);
    assert.deepEqual(await release(enrolment, [again]), rootKey);
  });

  it('I-6 the chip refuses what the authority did not approve for this installation', async () => {
    const { enrolment, rootKey, now, approval } = await adopt();
    assert.deepEqual(await opensWith(enrolment, approval), rootKey, 'positive control');

    const ofStranger = signApproval(request(enrolment, now, 'x'), STRANGER.privateKey);
    const elsewhere = { ...enrolment, installation: randomBytes(16).toString('hex') };
    const ofAnother = signApproval(request(elsewhere, now, 'x'), AUTHORITY.privateKey);
    // For the values of now, so that only who signed, and for whom, is at fault.
    for (const bad of [ofStranger, ofAnother]) await refusedByChip(enrolment, bad, Rc.SIGNATURE);
    await chip.extend(7, NEXT);
    const state = await chip.root((tpm) => tpm.readPlatformState(enrolment));
    // The old signature with the values of now, and with those it is of.
    const forged = { ...approval, pcrs: state.pcrs };
    for (const [bad, why] of [
      [ofStranger, 'another key'],
      [ofAnother, 'another installation'],
      [forged, 'changed values'],
      [{ ...approval, counter: (now.counter + 1n).toString() }, 'a changed counter'],
    ] as const) {
      assert.equal(isApproved(enrolment, AUTHORITY.publicKey, bad), false, why);
      await assert.rejects(release(enrolment, [bad]), refuses('platform-policy', /no approval/), why);
    }
    for (const bad of [forged, approval]) await refusedByChip(enrolment, bad, Rc.SIGNATURE);
    assert.equal(isApproved(enrolment, AUTHORITY.publicKey, approval), true);
    assert.equal(isApproved(enrolment, AUTHORITY.publicKey, { label: 'x' }), false);
    await assert.rejects(
      release(
        {
          ...enrolment,
          root: { ...enrolment.root, policy: { kind: 'authority', authority: STRANGER.publicKey } },
        },
        [ofStranger],
      ),
      refuses('tpm-fault', /not that of the authority/),
    );
  });

  it('I-6 a ticket of the null hierarchy is worth nothing', async () => {
    const { enrolment, approval } = await adopt();
    const step = stepOf(enrolment, approval);
    for (const [hierarchy, isTaken] of [
      [Rh.OWNER, true],
      [Rh.NULL, false],
    ] as const) {
      await chip.direct((tpm) =>
        underPolicy(tpm, async (session) => {
          await runPolicy(tpm, session, step.approved!.policy);
          const { signer, policyRef = Buffer.alloc(0) } = step;
          const { objectHandle } = await tpm.run(
            LoadExternal,
            {},
            { inPrivate: undefined, inPublic: signer, hierarchy },
          );
          const key = objectEntity(objectHandle, signer);
          const approvedPolicy = Buffer.from(approval.policyDigest, 'hex');
          const digest = createHash('sha256').update(approvedPolicy).update(policyRef).digest();
          const { validation } = await tpm.run(
            VerifySignature,
            { keyHandle: key },
            { digest, signature: step.approved!.signature },
          );
          await flush(tpm, objectHandle);
          const authorized = tpm.run(
            PolicyAuthorize,
            { policySession: session },
            { approvedPolicy, policyRef, keySign: key.name, checkTicket: validation },
          );
          if (isTaken) await authorized;
          else
            await assert.rejects(authorized, (error) =>
              TpmError.is(error, Rc.TICKET, Rc.HIERARCHY, Rc.VALUE),
            );
        }),
      );
    }
  });

  it('I-6 another implementation gets the same verdicts from the chip', async function () {
    this.timeout(120_000);
    const { enrolment, rootKey, approval } = await adopt();
    assert.deepEqual(await byTools(enrolment, approval), { key: rootKey }, 'positive control');
    await chip.extend(7, NEXT);
    assert.match((await byTools(enrolment, approval)).failure ?? '', /PolicyAuthorize\(0x1C4\)/);
  });

  it('I-7 an approved release shows no secret on the bus', async () => {
    const { enrolment, rootKey, recoveryInputs, approval } = await adopt();
    const bus = await startRecordingProxy(chip.swtpm.socket);
    try {
      assert.deepEqual(
        await chip.root((tpm) => tpm.releaseRootKey(enrolment, [approval]), bus.path),
        rootKey,
      );
      assert.ok(bus.commands.some((command) => commandCode(command) === PolicyAuthorize.code));
      for (const half of [recoveryInputs.subarray(0, 32), recoveryInputs.subarray(32), rootKey]) {
        for (let at = 0; at + 8 <= half.length; at++) assert.equal(bus.saw(half.subarray(at, at + 8)), false);
      }
    } finally {
      await bus.close();
    }
  });

  it('an interposer that changes hints gets a refusal and no key', async () => {
    const { enrolment, approval } = await adopt();
    await chip.extend(7, NEXT);
    const zeros = Buffer.alloc(32);
    const now = createHash('sha256').update(zeros).update(NEXT).digest();
    const bus = await startRecordingProxy(chip.swtpm.socket, {
      // The values that were approved, in place of those that are.
      response: (message) => {
        const at = message.indexOf(now);
        if (at >= 0) zeros.copy(message, at);
        return message;
      },
    });
    try {
      await assert.rejects(
        chip.root((tpm) => tpm.releaseRootKey(enrolment, [approval]), bus.path),
        (error: Error) => refuses('platform-policy')(error) && TpmError.is(error.cause, Rc.SIGNATURE),
      );
    } finally {
      await bus.close();
    }
  });

  it('adopts no authority without an approval that opens, and leaves nothing behind then', async () => {
    const { enrolment, rootKey } = await chip.enrol();
    const now = await chip.root((tpm) => tpm.readPlatformState(enrolment));
    const other = signApproval(
      request(enrolment, predicted(now, 'sha256:0', NEXT), 'other'),
      AUTHORITY.privateKey,
    );
    const before = await chip.direct((tpm) => listHandles(tpm, Ht.NV_INDEX));
    for (const approvals of [[], [other]]) {
      const policy = {
        kind: 'authority',
        authority: AUTHORITY.publicKey,
        pcrSelection: PCRS,
      } as const;
      await assert.rejects(
        chip.root((tpm) => tpm.nextGeneration(enrolment, { policy, approvals })),
        refuses('platform-policy'),
      );
    }
    assert.deepEqual(await chip.direct((tpm) => listHandles(tpm, Ht.NV_INDEX)), before);
    assert.deepEqual(await release(enrolment, []), rootKey);
  });

  it('rotates under the same approvals, and goes over to another authority', async () => {
    const { enrolment, rootKey, now, approval } = await adopt();
    const damaged = { ...approval, signature: undefined } as unknown as Approval;
    const approvals = [damaged, approval];
    const rotated = await chip.root((tpm) => tpm.nextGeneration(enrolment, { approvals }));
    assert.deepEqual(await release(enrolment, approvals), rootKey);
    assert.deepEqual(await release(rotated.enrolment, approvals), rotated.rootKey);

    const other = signApproval(request(enrolment, now, 'other'), STRANGER.privateKey);
    const policy = { kind: 'authority', authority: STRANGER.publicKey, pcrSelection: PCRS } as const;
    const moved = await chip.root((tpm) =>
      tpm.nextGeneration(rotated.enrolment, { policy, approvals: [other] }),
    );
    assert.deepEqual(await release(moved.enrolment, [approval, other]), moved.rootKey);
    await assert.rejects(release(moved.enrolment, [approval]), refuses('platform-policy'));
    await chip.root((tpm) => tpm.eraseGeneration(moved.enrolment, rotated.enrolment.root));
    await assert.rejects(release(rotated.enrolment, [approval]), refuses('tpm-emptied'));
  });

  it('keeps the public half only, whatever it is given', async () => {
    const { enrolment } = await chip.enrol();
    const now = await chip.root((tpm) => tpm.readPlatformState(enrolment));
    const approval = signApproval(request(enrolment, now, 'now'), AUTHORITY.privateKey);
    const policy = {
      kind: 'authority',
      authority: AUTHORITY.privateKey,
      pcrSelection: PCRS,
    } as const;
    const options = { policy, approvals: [approval] };
    const next = await chip.root((tpm) => tpm.nextGeneration(enrolment, options));
    assert.deepEqual(next.enrolment.root.policy, { kind: 'authority', authority: AUTHORITY.publicKey });
  });

  const scopeOf = (enrolment: RootTpmEnrolment) => ({
    purpose: PURPOSE,
    subject: Buffer.from(enrolment.installation, 'hex'),
    counter: writtenEntity(enrolment.revocation.handle, REVOCATION_SHAPE),
  });
  const stepOf = (enrolment: RootTpmEnrolment, approval: Approval) =>
    authorizeStep(authorityPublic(AUTHORITY.publicKey), scopeOf(enrolment), approval);

  /** The halves as an independent program with the files and the chip gets them, without any check of the manager's. */
  function opensWith(enrolment: RootTpmEnrolment, approval: Approval): Promise<Buffer> {
    const steps = [stepOf(enrolment, approval)];
    return chip.direct((tpm) =>
      withLoaded(tpm, enrolment, (sealed) =>
        underPolicy(tpm, async (session) => {
          const index = await halfOf(tpm, enrolment);
          await runPolicy(tpm, session, steps);
          const { outData } = await tpm.run(Unseal, { itemHandle: withSession(sealed, session) }, {});
          await runPolicy(tpm, session, steps);
          const authHandle = withSession(index, session);
          const { data } = await tpm.run(NV_Read, { authHandle, nvIndex: index }, { size: 32, offset: 0 });
          return deriveRootKey(outData, data, INSTALLATION);
        }),
      ),
    );
  }

  const refusedByChip = (enrolment: RootTpmEnrolment, approval: Approval, ...codes: number[]) =>
    assert.rejects(opensWith(enrolment, approval), (error) => TpmError.is(error, ...codes));

  /** The same with tpm2-tools. */
  async function byTools(
    enrolment: RootTpmEnrolment,
    approval: Approval,
  ): Promise<{ key?: Buffer; failure?: string }> {
    const directory = mkdtempSync(join(tmpdir(), 'vtpm-tools-'));
    const tools = (program: string, ...args: string[]) => chip.tools(directory, program, ...args);
    const keep = (name: string, bytes: Uint8Array | string) => writeFileSync(join(directory, name), bytes);
    const { root, revocation } = enrolment;
    const policyRef = stepOf(enrolment, approval).policyRef!;
    try {
      keep('approved', Buffer.from(approval.policyDigest, 'hex'));
      keep('message', concat(Buffer.from(approval.policyDigest, 'hex'), policyRef));
      keep('reference', policyRef);
      const rs = Buffer.from(approval.signature.base64, 'base64');
      const part = (bytes: Buffer) => concat(Buffer.of(0, bytes.length), bytes);
      // TPMT_SIGNATURE: ECDSA, SHA-256, r, s.
      keep(
        'signature',
        concat(Buffer.from('0018000b', 'hex'), part(rs.subarray(0, 32)), part(rs.subarray(32))),
      );
      keep('counter', Buffer.from(BigInt(approval.counter).toString(16).padStart(16, '0'), 'hex'));
      for (const name of ['sealedPublic', 'sealedPrivate'] as const) {
        const bytes = Buffer.from(root[name], 'base64');
        keep(name, concat(Buffer.of(bytes.length >> 8, bytes.length & 0xff), bytes));
      }
      const { bytes } = authorityPublic(AUTHORITY.publicKey);
      keep('authority.pub', concat(Buffer.of(bytes.length >> 8, bytes.length & 0xff), bytes));
      await tools('tpm2_loadexternal', '-C', 'o', '-u', 'authority.pub', '-c', 'authority.ctx', '-n', 'name');
      await tools('tpm2_flushcontext', '-t');
      await tools(
        'tpm2_verifysignature',
        '-c',
        'authority.ctx',
        '-g',
        'sha256',
        '-m',
        'message',
        '-s',
        'signature',
        '-t',
        'ticket',
      );
      await tools('tpm2_flushcontext', '-t');
      const policy = async () => {
        await tools('tpm2_policypcr', '-S', 'session', '-l', root.pcrSelection);
        const index = `0x${revocation.handle.toString(16)}`;
        await tools('tpm2_policynv', '-S', 'session', '-i', 'counter', '-C', index, index, 'eq');
        const args = ['-i', 'approved', '-q', 'reference', '-n', 'name', '-t', 'ticket'];
        await tools('tpm2_policyauthorize', '-S', 'session', ...args);
      };
      await tools('tpm2_startauthsession', '--policy-session', '-S', 'session');
      try {
        await policy();
        const parent = `0x${enrolment.srkHandle.toString(16)}`;
        await tools(
          'tpm2_load',
          '-C',
          parent,
          '-u',
          'sealedPublic',
          '-r',
          'sealedPrivate',
          '-c',
          'sealed.ctx',
        );
        await tools('tpm2_flushcontext', '-t');
        await tools('tpm2_unseal', '-c', 'sealed.ctx', '-p', 'session:session', '-o', 'secret');
        await tools('tpm2_flushcontext', '-t');
        await tools('tpm2_policyrestart', '-S', 'session');
        await policy();
        const half = `0x${root.nvHandle.toString(16)}`;
        await tools('tpm2_nvread', half, '-C', half, '-P', 'session:session', '-o', 'half');
        const read = (name: string) => readFileSync(join(directory, name));
        return { key: deriveRootKey(read('secret'), read('half'), INSTALLATION) };
      } catch (error) {
        return { failure: `${(error as { stderr?: string }).stderr ?? error}` };
      } finally {
        await tools('tpm2_flushcontext', 'session');
        await tools('tpm2_flushcontext', '-t');
      }
    } finally {
      rmSync(directory, { recursive: true, force: true });
    }
  }
});

function underPolicy<T>(tpm: Tpm, body: (session: Session) => Promise<T>): Promise<T> {
  return inSession(tpm, { kind: 'policy' }, body);
}
