import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import {
  Alg,
  inSession,
  type ObjectEntity,
  PCR_Extend,
  type PolicyStep,
  parsePcrSelection,
  pcrDigest,
  permanent,
  policyDigest,
  readPcrs,
  runPolicy,
  type Session,
  sealedTemplate,
  srkTemplate,
  type Tpm,
  Unseal,
  withPassword,
  withSession,
} from 'tpm2-ts-bindings';
import { withPrimary } from '../support/tpm-fixture.js';
import { flip, type Tpm2Tools, withSuiteTools } from '../support/tpm2-tools.js';
import { privateFile, publicFile } from '../support/tpm2-tools-files.js';
import { create, OWNER, says, withChild } from './make.js';

const SELECTION = parsePcrSelection('sha256:16,23');

describe('tpm2-ts-bindings and tpm2-tools: sealed data', () => {
  let tools: Tpm2Tools;
  withSuiteTools((made) => {
    tools = made;
  });

  const unseal = (tpm: Tpm, item: ObjectEntity, session: Session): Promise<Buffer> =>
    tpm.run(Unseal, { itemHandle: withSession(item, session) }, {}).then(({ outData }) => outData);

  /** What `sealed.*` of the tools holds, through a session of ours that encrypts. */
  const openSealed = (auth: Buffer, steps?: readonly PolicyStep[]): Promise<Buffer> =>
    tools.direct((tpm) =>
      tools.withContext(tpm, 'parent.ctx', (parent) => {
        const sealed = {
          outPublic: tools.read('sealed.pub', publicFile),
          outPrivate: tools.read('sealed.priv', privateFile),
        };
        const kind = steps === undefined ? 'hmac' : 'policy';
        const open = (item: ObjectEntity) =>
          inSession(tpm, { kind, salt: parent, encrypt: 'out' }, async (session) => {
            if (steps !== undefined) await runPolicy(tpm, session, steps);
            return unseal(tpm, item, session);
          });
        return withChild(tpm, parent, sealed, open, auth);
      }),
    );

  /** Seals with this package, into files of the tools. */
  const seal = (data: Buffer, auth: Buffer, steps: readonly PolicyStep[]): Promise<void> =>
    tools.direct((tpm) =>
      withPrimary(tpm, srkTemplate(), async (parent) => {
        const made = await create(tpm, parent, sealedTemplate(policyDigest(steps)), { data, auth });
        await tools.saveContext(tpm, parent, 'parent.ctx');
        tools.writeAs('sealed.pub', publicFile, made.outPublic);
        tools.writeAs('sealed.priv', privateFile, made.outPrivate);
      }),
    );
  const load = 'tpm2_load -Q -C parent.ctx -u sealed.pub -r sealed.priv -c sealed.ctx';

  const pcrNow = async (): Promise<PolicyStep> => ({
    assert: 'pcr',
    selection: SELECTION,
    digest: pcrDigest(Alg.SHA256, await tools.direct((tpm) => readPcrs(tpm, SELECTION))),
  });
  const extend = () =>
    tools.direct((tpm) =>
      tpm.run(
        PCR_Extend,
        { pcrHandle: withPassword(permanent(16)) },
        { digests: [{ hashAlg: Alg.SHA256, digest: randomBytes(32) }] },
      ),
    );

  it('what tpm2_create sealed opens in our encrypted session, with its authValue only', async () => {
    const data = randomBytes(100);
    tools.write('data', data);
    await tools.run('tpm2_createprimary -Q -C o -G ecc -c parent.ctx');
    // With zeros inside and at the end.
    const auth = Buffer.from('6100620000', 'hex');
    await tools.run(
      `tpm2_create -Q -C parent.ctx -i data -p hex:${auth.toString('hex')} -u sealed.pub -r sealed.priv`,
    );
    assert.deepEqual(await openSealed(auth), data);
    await assert.rejects(openSealed(Buffer.from('610062')), says('AUTH_FAIL'));
    tools.write('sealed.priv', flip(tools.bytes('sealed.priv')));
    await assert.rejects(openSealed(auth), says('INTEGRITY'));
  });

  it('what we sealed to PCRs, authValue and command opens with the tools, and only so', async () => {
    const data = randomBytes(128);
    const auth = Buffer.from('00ff00aa', 'hex');
    await seal(data, auth, [
      await pcrNow(),
      { assert: 'auth-value' },
      { assert: 'command-code', code: Unseal.code },
    ]);
    await tools.run(load);
    const open = (password: string, check: (line: string) => Promise<unknown>) =>
      tools.inSession('--policy-session', async () => {
        for (const step of [
          'tpm2_policypcr -Q -S session.ctx -l sha256:16,23',
          'tpm2_policyauthvalue -Q -S session.ctx',
          'tpm2_policycommandcode -Q -S session.ctx TPM2_CC_Unseal',
        ])
          await tools.run(step);
        await check(`tpm2_unseal -Q -c sealed.ctx -o out -p session:session.ctx+hex:${password}`);
      });
    await open('00ff00aa', (line) => tools.run(line));
    assert.deepEqual(tools.bytes('out'), data);
    await open('00ff00ab', (line) => tools.refused(line, /authorization failure/));
    await extend();
    await open('00ff00aa', (line) => tools.refused(line, /policy check failed/));

    tools.write('sealed.priv', flip(tools.bytes('sealed.priv')));
    await tools.refused(load, /integrity check failed/);
  });

  it('what the tools sealed to a policy of theirs opens with ours, and only so', async () => {
    const data = randomBytes(64);
    tools.write('data', data);
    await tools.run('tpm2_createprimary -Q -C o -G ecc -c parent.ctx');
    await tools.inSession('', async () => {
      await tools.run('tpm2_policypcr -Q -S session.ctx -l sha256:16,23');
      await tools.run('tpm2_policysecret -Q -S session.ctx -c o');
      await tools.run('tpm2_policypassword -Q -S session.ctx -L policy');
    });
    await tools.run('tpm2_create -Q -C parent.ctx -i data -p word -L policy -u sealed.pub -r sealed.priv');
    const auth = Buffer.from('word');
    const owner: PolicyStep = { assert: 'secret', of: withPassword(OWNER) };
    const pcr = await pcrNow();
    assert.deepEqual(await openSealed(auth, [pcr, owner, { assert: 'password' }]), data);
    assert.deepEqual(await openSealed(auth, [pcr, owner, { assert: 'auth-value' }]), data);
    await assert.rejects(openSealed(auth, [owner, pcr, { assert: 'password' }]), says('POLICY_FAIL'));
    await assert.rejects(
      openSealed(Buffer.from('ward'), [pcr, owner, { assert: 'password' }]),
      says('AUTH_FAIL', 'BAD_AUTH'),
    );
    await extend();
    await assert.rejects(openSealed(auth, [pcr, owner, { assert: 'password' }]), says('POLICY_FAIL'));
  });
});
