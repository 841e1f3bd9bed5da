import assert from 'node:assert/strict';
import { createECDH, randomBytes } from 'node:crypto';
import { mkdtempSync, rmSync, symlinkSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import {
  ObjectAttribute as A,
  Alg,
  agreementKeyTemplate,
  Curve,
  decode,
  ECDH_ZGen,
  encode,
  leftPad,
  objectEntity,
  type Public,
  publicArea,
  Rh,
  tpmsEccPoint,
  tpmtPublic,
  withPassword,
} from 'tpm2-ts-bindings';
import { ManagerError } from 'vtpm-manager/error';
import { readPlatform, verifyEvidence } from 'vtpm-manager/peer/evidence';
import { sealSecret, verifyImportKey } from 'vtpm-manager/peer/import-key';
import { importSecret } from 'vtpm-manager/root-tpm/import-secret';
import type { ImportKey, RootTpm } from 'vtpm-manager/root-tpm/index';
import type { ImportKeyOffer } from 'vtpm-proto';
import { isA } from '../support/is-a.js';
import { type RecordingProxy, startRecordingProxy } from '../support/recording-proxy.js';
import { startSwtpm } from '../support/swtpm.js';
import { pcrExtend } from '../support/tpm-commands.js';
import { connectTpm, NOTHING, withPrimary } from '../support/tpm-fixture.js';
import { evidenceOf, type Host, hostOf, LyingTpm, transcript } from './peer-fixture.js';
import { Chip, PCRS, refuses } from './root-tpm-fixture.js';

describe('manager: the key that a secret is sent to', () => {
  describe('offered by another host', () => {
    const tpm = new LyingTpm();
    const over = transcript();
    const facts = verifyEvidence(tpm.peer, tpm.evidence(over), over);
    const verify = (offer: ImportKeyOffer) => verifyImportKey(tpm.peer, offer, over, facts);
    const changed = (change: Partial<Public>) =>
      tpm.importKey(over, (key) => ({ ...key, ...change }) as Public);

    it('is taken where its TPM certifies it for this session', () => {
      verify(tpm.importKey(over));
      assert.throws(
        () => verify(tpm.importKey(transcript())),
        refuses('peer-unattested', /made for another nonce/),
      );
      const other = tpm.importKey(over);
      assert.throws(
        () => verify({ ...tpm.importKey(over), publicArea: other.publicArea }),
        refuses('peer-unattested', /of another object/),
      );
      assert.throws(
        () => verify(new LyingTpm().importKey(over)),
        refuses('peer-import-key'),
        'bound to other values',
      );
      const liar = new LyingTpm();
      liar.values.splice(0, 2, ...tpm.values);
      assert.throws(
        () => verify(liar.importKey(over)),
        refuses('peer-unattested', /signature does not verify/),
      );
    });

    it('is refused with any attribute other than it has to have: peer-import-key', () => {
      const { objectAttributes } = agreementKeyTemplate(NOTHING).value;
      for (let bit = 0; bit < 32; bit++) {
        const offer = changed({ objectAttributes: (objectAttributes ^ (1 << bit)) >>> 0 });
        assert.throws(() => verify(offer), refuses('peer-import-key', /not as it has to be/), `bit ${bit}`);
      }
      for (const named of [A.fixedTPM, A.fixedParent, A.sensitiveDataOrigin, A.stClear, A.decrypt]) {
        assert.notEqual(objectAttributes & named, 0);
      }
      assert.equal(objectAttributes & (A.userWithAuth | A.restricted | A.sign), 0);
    });

    it('is refused with another policy, scheme, hash or curve: peer-import-key', () => {
      const { value } = agreementKeyTemplate(NOTHING);
      assert.ok(value.type === Alg.ECC);
      const { parameters } = value;
      for (const change of [
        { authPolicy: randomBytes(32) },
        { authPolicy: NOTHING },
        { nameAlg: Alg.SHA384 },
        { parameters: { ...parameters, scheme: { scheme: Alg.NULL } } },
        { parameters: { ...parameters, kdf: { scheme: Alg.KDF1_SP800_56A, hashAlg: Alg.SHA256 } } },
      ] as const) {
        assert.throws(() => verify(changed(change)), refuses('peer-import-key', /not as it has to be/));
      }
      const curve = changed({ parameters: { ...parameters, curveID: Curve.NIST_P384 } } as Partial<Public>);
      assert.throws(() => verify(curve), refuses('peer-import-key', /cannot be read/));
      const registers = { ...tpm.importKey(over), pcrSelection: 'sha256:0' };
      assert.throws(() => verify(registers), refuses('peer-import-key', /bound to the registers sha256:0/));
    });

    it('is refused in another hierarchy than the one that a reset empties: peer-import-key', () => {
      for (const hierarchy of [Rh.OWNER, Rh.ENDORSEMENT, Rh.PLATFORM]) {
        assert.throws(
          () => verify(tpm.importKey(over, undefined, hierarchy)),
          refuses('peer-import-key', /not in the null hierarchy/),
        );
      }
    });

    it('is refused where the host was started again since its quote: peer-restarted', () => {
      const before = tpm.boot;
      tpm.boot = { ...before, restartCount: before.restartCount + 1 };
      const offer = tpm.importKey(over);
      tpm.boot = before;
      assert.throws(() => verify(offer), refuses('peer-restarted'));
    });

    it('I-10 is refused by name, whatever bytes it is', () => {
      const good = tpm.importKey(over);
      const noise = fc.uint8Array({ maxLength: 200 });
      const near = (bytes: Uint8Array) =>
        fc.oneof(
          fc.constant(bytes),
          noise,
          fc.nat(bytes.length).map((size) => bytes.subarray(0, size)),
          fc.tuple(fc.nat(bytes.length - 1), fc.integer({ min: 1, max: 255 })).map(([at, by]) => {
            const copy = Buffer.from(bytes);
            copy.writeUInt8(copy.readUInt8(at) ^ by, at);
            return copy;
          }),
        );
      const offers = fc.record({
        publicArea: near(good.publicArea),
        certifyInfo: near(good.certifyInfo),
        certifySignature: near(good.certifySignature),
        pcrSelection: fc.oneof(fc.constant(PCRS), fc.string()),
      });
      const codes = ['peer-import-key', 'peer-unattested', 'peer-restarted'];
      fc.assert(
        fc.property(offers, (offer) => {
          try {
            verify(offer);
            assert.deepEqual(offer.publicArea, good.publicArea);
          } catch (error) {
            assert.ok(isA(error, ManagerError) && codes.includes(error.code), String(error));
          }
          try {
            sealSecret(offer.publicArea);
          } catch (error) {
            assert.ok(isA(error, ManagerError) && error.code === 'peer-import-key', String(error));
          }
        }),
      );
    });
  });

  describe('in a TPM', () => {
    const chip = new Chip();
    let host: Host;
    const over = transcript();
    const make = (root: RootTpm): Promise<ImportKey> =>
      root.makeImportKey(host.enrolment, host.attestationKey, PCRS, over);
    const withKey = (body: (root: RootTpm, key: ImportKey) => Promise<void>, path?: string): Promise<void> =>
      chip.root(async (root) => body(root, await make(root)), path);

    beforeEach(async () => {
      const { enrolment } = await chip.enrol();
      host = await chip.root((root) => hostOf(root, enrolment));
    });

    it('gives the secret once, with other commands in between, and leaves nothing in the TPM', () =>
      withKey(async (root, key) => {
        const other = await make(root);
        await evidenceOf(root, host, over);
        await root.releaseRootKey(host.enrolment);
        const sealed = sealSecret(key.publicArea);
        const second = sealSecret(other.publicArea);
        assert.deepEqual(await key.unwrap(sealed.point), sealed.secret);
        assert.deepEqual(await other.unwrap(second.point), second.secret);
        const again = refuses('import-key-lost', /used or dropped already.*Begin the migration again/);
        await assert.rejects(key.unwrap(sealed.point), again);
      }));

    it('is as a source wants it', () =>
      withKey(async (root, key) => {
        const evidence = await evidenceOf(root, host, over);
        const { pcrDigest } = readPlatform(host.peer, evidence, over);
        const peer = { ...host.peer, platforms: [{ pcrSelection: PCRS, pcrDigest, approvedAt: 1n }] };
        verifyImportKey(peer, key, over, verifyEvidence(peer, evidence, over));
        const { enrolment, attestationKey } = host;
        const other = await root.makeImportKey(enrolment, attestationKey, 'sha256:7,0', over);
        verifyImportKey(peer, other, over, verifyEvidence(peer, evidence, over));
        const { point, secret } = sealSecret(other.publicArea);
        assert.deepEqual(await other.unwrap(point), secret);
      }));

    it('is another one each time, and of no use to two at once', () =>
      withKey(async (root, key) => {
        const other = await make(root);
        assert.notDeepEqual(key.publicArea, other.publicArea);
        const { point, secret } = sealSecret(key.publicArea);
        assert.notDeepEqual(await other.unwrap(point), secret);
        const both = await Promise.allSettled([key.unwrap(point), key.unwrap(point)]);
        assert.deepEqual(
          both.map(({ status }) => status),
          ['fulfilled', 'rejected'],
        );
      }));

    it('is gone when it was dropped', () =>
      withKey(async (_root, key) => {
        await key.drop();
        await key.drop();
        await assert.rejects(key.unwrap(sealSecret(key.publicArea).point), refuses('import-key-lost'));
      }));

    it('is still there after what is no point', () =>
      withKey(async (_root, key) => {
        const { point, secret } = sealSecret(key.publicArea);
        const off = Buffer.from(point);
        off.writeUInt8(off.readUInt8(40) ^ 1, 40);
        for (const wrong of [
          off,
          point.subarray(1),
          Buffer.concat([point, point]),
          NOTHING,
          Buffer.alloc(68),
        ]) {
          await assert.rejects(key.unwrap(wrong), refuses('bad-request', /no point of P-256/));
        }
        assert.deepEqual(await key.unwrap(point), secret);
      }));

    describe('behind a bus', () => {
      let bus: RecordingProxy;
      beforeEach(async () => {
        bus = await startRecordingProxy(chip.swtpm.socket);
      });
      afterEach(() => bus.close());

      it('I-6 is of no use once the platform is another one', () =>
        withKey(async (root, key) => {
          const other = await make(root);
          await bus.inject(pcrExtend(4, randomBytes(32)));
          const good = sealSecret(other.publicArea);
          assert.deepEqual(await other.unwrap(good.point), good.secret, 'a register that is not selected');
          await bus.inject(pcrExtend(7, randomBytes(32)));
          await assert.rejects(
            key.unwrap(sealSecret(key.publicArea).point),
            refuses('platform-policy', /platform changed while a vTPM was on its way/),
          );
        }, bus.path));

      it('I-7 the secret is in no byte on the bus', async () => {
        const ephemeral = createECDH('prime256v1');
        const own = ephemeral.generateKeys();
        const inPoint = { x: own.subarray(1, 33), y: own.subarray(33) };
        const point = encode(tpmsEccPoint, inPoint);
        const agreed = (area: Public): Buffer => {
          assert.ok(area.type === Alg.ECC);
          return ephemeral.computeSecret(
            Buffer.concat([Buffer.of(4), leftPad(area.unique.x, 32), leftPad(area.unique.y, 32)]),
          );
        };
        await withKey(async (_root, key) => {
          const area = decode(tpmtPublic, key.publicArea);
          bus.forget();
          const secret = await key.unwrap(point);
          const { name } = objectEntity(0, { bytes: key.publicArea, value: area });
          assert.deepEqual(secret, importSecret(agreed(area), point, name));
          assert.ok(!bus.saw(agreed(area)) && !bus.saw(secret));
        }, bus.path);
        // The same agreement in no session: the same recording does see it.
        const tpm = await connectTpm(bus.path);
        const { value } = agreementKeyTemplate(NOTHING);
        const open = publicArea({ ...value, objectAttributes: value.objectAttributes | A.userWithAuth });
        await withPrimary(tpm, open, async (key) => {
          await tpm.run(ECDH_ZGen, { keyHandle: withPassword(key) }, { inPoint });
          assert.ok(bus.saw(agreed(key.publicArea.value)));
        });
        await tpm.close();
      });
    });

    it('is lost with a reset of the TPM', () =>
      withKey(async (root, key) => {
        await chip.swtpm.restart();
        // The connection is gone with it; the next call makes another one.
        await assert.rejects(root.readRevocationCounter(host.enrolment), refuses('tpm-unreachable'));
        const lost = refuses('import-key-lost', /was reset since it was made/);
        await assert.rejects(key.unwrap(sealSecret(key.publicArea).point), lost);
      }));

    it('is of no use in another TPM', async () => {
      const directory = mkdtempSync(join(tmpdir(), 'vtpm-swap-'));
      const path = join(directory, 'tpm.sock');
      const another = await startSwtpm();
      try {
        symlinkSync(chip.swtpm.socket, path);
        await withKey(async (root, key) => {
          rmSync(path);
          symlinkSync(another.socket, path);
          await chip.swtpm.kill();
          await assert.rejects(root.readRevocationCounter(host.enrolment), refuses('tpm-unreachable'));
          await assert.rejects(key.unwrap(sealSecret(key.publicArea).point), refuses('import-key-lost'));
          await assert.rejects(make(root), refuses('tpm-emptied'));
        }, path);
      } finally {
        await another.stop();
        rmSync(directory, { recursive: true });
      }
    });
  });
});
