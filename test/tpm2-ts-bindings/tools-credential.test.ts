import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import {
  ActivateCredential,
  type Credential,
  inSession,
  makeCredential,
  nameOf,
  type ObjectEntity,
  type PolicyStep,
  permanent,
  policyDigest,
  Rh,
  runPolicy,
  withPassword,
  withSession,
} from 'tpm2-ts-bindings';
import { flip, type Tpm2Tools, withSuiteTools } from '../support/tpm2-tools.js';
import { credentialFile, publicFile } from '../support/tpm2-tools-files.js';
import { says } from './make.js';

/** What the EK Credential Profile lets the EK's use depend on. */
const EK_POLICY: PolicyStep[] = [{ assert: 'secret', of: withPassword(permanent(Rh.ENDORSEMENT)) }];

for (const kind of ['ecc', 'rsa'] as const) {
  describe(`tpm2-ts-bindings and tpm2-tools: credentials for an EK of ${kind}`, () => {
    let tools: Tpm2Tools;
    withSuiteTools((made) => {
      tools = made;
    });

    before(async () => {
      await tools.run(`tpm2_createek -Q -G ${kind} -c ek.ctx -u ek.pub`);
      await tools.run('tpm2_createak -Q -C ek.ctx -G ecc -g sha256 -s ecdsa -c ak.ctx -u ak.pub -n ak.name');
    });

    /** ActivateCredential of ours, with the keys that the tools made. */
    const activate = (credential: Credential, activated = 'ak.ctx'): Promise<Buffer> =>
      tools.direct((tpm) =>
        tools.withContext(tpm, 'ek.ctx', (ek) => {
          assert.deepEqual(ek.publicArea.value.authPolicy, policyDigest(EK_POLICY));
          const withAk = (ak: ObjectEntity) =>
            inSession(tpm, { kind: 'policy' }, async (session) => {
              await runPolicy(tpm, session, EK_POLICY);
              const handles = { activateHandle: withPassword(ak), keyHandle: withSession(ek, session) };
              return (await tpm.run(ActivateCredential, handles, credential)).certInfo;
            });
          return tools.withContext(tpm, activated, withAk);
        }),
      );

    for (const [where, options] of [
      ['on the TPM', '-e ek.pub'],
      ['without a TPM', '-T none -u ek.pub'],
    ]) {
      it(`we activate what makecredential made ${where}, and nothing changed`, async () => {
        const credential = randomBytes(32);
        tools.write('credential', credential);
        await tools.run(
          `tpm2_makecredential -Q ${options} -s credential -n ${tools.bytes('ak.name').toString('hex')} -o blob`,
        );
        const blob = tools.read('blob', credentialFile);
        assert.deepEqual(await activate(blob), credential);
        const changed = { ...blob, credentialBlob: flip(blob.credentialBlob) };
        await assert.rejects(activate(changed), says('INTEGRITY'));
        await tools.run('tpm2_createprimary -Q -C e -G ecc -c other.ctx');
        await assert.rejects(activate(blob, 'other.ctx'), says('INTEGRITY'));
      });
    }

    it('activatecredential takes what our software made, and nothing changed', async () => {
      const ek = tools.read('ek.pub', publicFile);
      const ak = tools.read('ak.pub', publicFile);
      const name = nameOf(ak.value.nameAlg, ak.bytes);
      assert.deepEqual(name, tools.bytes('ak.name'));
      const tool =
        'tpm2_activatecredential -Q -c ak.ctx -C ek.ctx -i blob -o activated -P session:session.ctx';
      const send = (blob: Credential, activate: () => Promise<unknown>): Promise<void> =>
        tools.inSession('--policy-session', async () => {
          tools.writeAs('blob', credentialFile, blob);
          await tools.run('tpm2_policysecret -Q -S session.ctx -c e');
          await activate();
        });
      const credential = randomBytes(32);
      const blob = makeCredential(ek.value, name, credential);
      await send(blob, () => tools.run(tool));
      assert.deepEqual(tools.bytes('activated'), credential);
      const refused = () => tools.refused(tool, /integrity check failed/);
      await send({ ...blob, credentialBlob: flip(blob.credentialBlob) }, refused);
      await send(makeCredential(ek.value, flip(name), credential), refused);
    });
  });
}
