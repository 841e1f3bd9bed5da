import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import {
  activateCredential,
  attestationKeyTemplate,
  type EndorsementKey,
  type EndorsementKeyName,
  endorsementKeyTemplate,
  HierarchyChangeAuth,
  makeCredential,
  permanent,
  Rh,
  type Tpm,
  withPassword,
} from 'tpm2-ts-bindings';
import { type RecordingProxy, startRecordingProxy } from '../support/recording-proxy.js';
import { type Swtpm, startSwtpm } from '../support/swtpm.js';
import { assertNothingLeaked, connectTpm, NOTHING, withPrimary } from '../support/tpm-fixture.js';
import { says } from './make.js';

const ENDORSEMENT = permanent(Rh.ENDORSEMENT);

describe('tpm2-ts-bindings: endorsement keys in use', () => {
  let swtpm: Swtpm;
  let bus: RecordingProxy;
  let tpm: Tpm;
  before(async () => {
    swtpm = await startSwtpm();
    bus = await startRecordingProxy(swtpm.socket);
    tpm = await connectTpm(bus.path);
  });
  after(async () => {
    await assertNothingLeaked(tpm);
    await tpm.close();
    await bus.close();
    await swtpm.stop();
  });

  const withKeys = (
    name: EndorsementKeyName,
    body: (key: EndorsementKey, ak: ReturnType<typeof withPassword>, akName: Buffer) => Promise<void>,
    auth?: Buffer,
  ) =>
    withPrimary(
      tpm,
      endorsementKeyTemplate(name),
      (entity) =>
        withPrimary(tpm, attestationKeyTemplate(), (ak) =>
          body(
            { name, entity, ...(auth && { by: withPassword(permanent(Rh.ENDORSEMENT, auth)) }) },
            withPassword(ak),
            ak.name,
          ),
        ),
      NOTHING,
      permanent(Rh.ENDORSEMENT, auth),
    );

  for (const name of ['L-1', 'L-2', 'H-1', 'H-2', 'H-3', 'H-4', 'H-6'] as const) {
    it(`${name} activates a credential, which is not seen on the bus`, async () => {
      await withKeys(name, async (key, ak, akName) => {
        const secret = randomBytes(32);
        const credential = makeCredential(key.entity.publicArea.value, akName, secret);
        bus.forget();
        assert.deepEqual(await activateCredential(tpm, key, ak, credential), secret);
        assert.ok(!bus.saw(secret));
        assert.ok(bus.saw(credential.secret));
        await assert.rejects(
          activateCredential(
            tpm,
            key,
            ak,
            makeCredential(key.entity.publicArea.value, randomBytes(34), secret),
          ),
          says('INTEGRITY', 'VALUE'),
          'made for another object',
        );
      });
    });
  }

  it('the authValue of the endorsement hierarchy is what its policy asks for', async () => {
    const auth = randomBytes(20);
    const change = (old: Buffer | undefined, newAuth: Buffer) =>
      tpm.run(HierarchyChangeAuth, { authHandle: withPassword(permanent(Rh.ENDORSEMENT, old)) }, { newAuth });
    await change(undefined, auth);
    for (const name of ['L-2', 'H-2'] as const) {
      await withKeys(
        name,
        async (key, ak, akName) => {
          const secret = randomBytes(16);
          const credential = makeCredential(key.entity.publicArea.value, akName, secret);
          assert.deepEqual(await activateCredential(tpm, key, ak, credential), secret);
          await assert.rejects(
            activateCredential(tpm, { ...key, by: withPassword(ENDORSEMENT) }, ak, credential),
            says('BAD_AUTH', 'AUTH_FAIL'),
          );
        },
        auth,
      );
    }
    await change(auth, NOTHING);
  });
});
