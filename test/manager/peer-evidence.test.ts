import assert from 'node:assert/strict';
import { generateKeyPairSync } from 'node:crypto';
import fc from 'fast-check';
import { type Approval, parsePcrSelection, St, signApproval } from 'tpm2-ts-bindings';
import { ManagerError, type ManagerErrorCode } from 'vtpm-manager/error';
import { readPlatform, verifyEvidence } from 'vtpm-manager/peer/evidence';
import { requireSameBoot } from 'vtpm-manager/peer/statement';
import { requestApproval } from 'vtpm-manager/root-tpm/index';
import { REVOCATION_SHAPE } from 'vtpm-manager/root-tpm/nv-counter';
import { writtenEntity } from 'vtpm-manager/root-tpm/nv-index';
import type { Evidence, Peer } from 'vtpm-proto';
import { isA } from '../support/is-a.js';
import { evidenceOf, hostOf, LyingTpm, transcript } from './peer-fixture.js';
import { Chip, INSTALLATION, PCRS, refuses } from './root-tpm-fixture.js';

const pair = (namedCurve: string) => {
  const { publicKey, privateKey } = generateKeyPairSync('ec', { namedCurve });
  return {
    publicKey: publicKey.export({ type: 'spki', format: 'pem' }) as string,
    privateKey: privateKey.export({ type: 'pkcs8', format: 'pem' }) as string,
  };
};
const AUTHORITY = pair('P-256');
const STRANGER = pair('P-256');
const flip = (bytes: Uint8Array, at = bytes.length - 1): Buffer => {
  const changed = Buffer.from(bytes);
  changed.writeUInt8(changed.readUInt8(at) ^ 1, at);
  return changed;
};

describe('manager: evidence of another host', () => {
  const tpm = new LyingTpm();
  const over = transcript();
  const good = tpm.evidence(over);
  const refusedAs = (code: ManagerErrorCode, evidence: Evidence, text?: RegExp, peer: Peer = tpm.peer) =>
    assert.throws(() => verifyEvidence(peer, evidence, over), refuses(code, text));

  it('holds where all of it is true', () => {
    const { approvedBy, boot, pcrSelection, pcrs } = verifyEvidence(tpm.peer, good, over);
    assert.deepEqual({ boot, pcrSelection }, { boot: tpm.boot, pcrSelection: PCRS });
    assert.deepEqual(
      Object.values(pcrs),
      tpm.values.map((value) => value.toString('hex')),
    );
    assert.match(approvedBy, /^approved here on 1970-/);
  });

  it('holds however the selection of registers is written, at either end', () => {
    const written = { ...good, pcrSelection: 'sha256:7,0' };
    assert.equal(verifyEvidence(tpm.peer, written, over).pcrSelection, PCRS);
    const peer = {
      ...tpm.peer,
      platforms: tpm.peer.platforms.map((one) => ({ ...one, pcrSelection: 'sha256:7,0,7' })),
    };
    assert.equal(verifyEvidence(peer, good, over).pcrSelection, PCRS);
    const odd = { ...tpm.peer, platforms: tpm.peer.platforms.map((one) => ({ ...one, pcrSelection: '?' })) };
    refusedAs('peer-platform', good, undefined, odd);
  });

  it('over another session is no evidence: peer-unattested', () => {
    assert.throws(
      () => verifyEvidence(tpm.peer, good, transcript()),
      refuses('peer-unattested', /made for another nonce/),
    );
  });

  it('of another TPM, or changed on its way, is no evidence: peer-unattested', () => {
    const verify = /the signature does not verify/;
    refusedAs('peer-unattested', new LyingTpm().evidence(over), verify);
    refusedAs('peer-unattested', { ...good, attest: flip(good.attest) }, verify);
    refusedAs('peer-unattested', { ...good, signature: flip(good.signature) }, verify);
    refusedAs('peer-unattested', { ...good, attest: good.attest.subarray(1) }, verify);
    refusedAs('peer-unattested', { ...good, signature: Buffer.of(0, 0x14, 0, 0xb, 0, 0) }, /another kind/);
  });

  it('without the key that its TPM signs with: peer-unattested', () => {
    const peer = { ...tpm.peer, attestationKey: Buffer.alloc(0) };
    refusedAs('peer-unattested', good, /no attestation key of it is enrolled/, peer);
  });

  it('is a quote, and of those registers with those values: peer-unattested', () => {
    const { revocationAttest: attest, revocationSignature: signature } = good;
    refusedAs('peer-unattested', { ...good, attest, signature }, /signed for something else/);
    const [first, second] = tpm.values as [Buffer, Buffer];
    refusedAs('peer-unattested', { ...good, pcrValues: [second, first] }, /other register values/);
    refusedAs('peer-unattested', { ...good, pcrSelection: 'sha256:0,4' }, /over other registers/);
    refusedAs('peer-unattested', { ...good, pcrSelection: 'sha1:0,7' }, /SHA-1/);
    refusedAs('peer-unattested', { ...good, pcrSelection: 'nonsense' }, /no PCR selection/);
    // The same bytes, so the same digest, cut elsewhere.
    const all = Buffer.concat([first, second]);
    const cut = [all.subarray(0, 31), all.subarray(31)];
    refusedAs('peer-unattested', { ...good, pcrValues: cut }, /not those of its selection/);
    refusedAs('peer-unattested', { ...good, pcrValues: [first] }, /not those of its selection/);
  });

  it('of a platform that nobody approved: peer-platform', () => {
    const peer = tpm.peer;
    refusedAs('peer-platform', good, /no platform is approved for it.*vtpmctl peer approve b/, {
      ...peer,
      platforms: [],
    });
    const others = (change: Partial<Peer['platforms'][0]>) => ({
      ...peer,
      platforms: peer.platforms.map((one) => ({ ...one, ...change })),
    });
    refusedAs('peer-platform', good, /another one is/, others({ pcrDigest: flip(tpm.pcrDigest) }));
    refusedAs('peer-platform', good, /another one is/, others({ pcrSelection: 'sha256:0,4' }));
  });

  it('of a host that was started again in between: peer-restarted', () => {
    const first = verifyEvidence(tpm.peer, good, over);
    requireSameBoot(tpm.peer, first.boot, verifyEvidence(tpm.peer, tpm.evidence(over), over).boot);
    for (const counts of ['resetCount', 'restartCount'] as const) {
      const later = { ...first.boot, [counts]: first.boot[counts] + 1 };
      assert.throws(
        () => requireSameBoot(tpm.peer, first.boot, later),
        refuses('peer-restarted', /"b" was started again/),
      );
    }
  });

  describe('under a policy authority', () => {
    const peer: Peer = { ...tpm.peer, platforms: [], policyAuthority: AUTHORITY.publicKey };
    const [pcr0 = '', pcr7 = ''] = tpm.values.map((value) => value.toString('hex'));
    const approval = (
      options: {
        counter?: bigint;
        by?: typeof AUTHORITY;
        installation?: string;
        handle?: number;
        pcr7?: string;
        selection?: string;
      } = {},
    ): Approval => {
      const handle = options.handle ?? tpm.handle;
      const request = requestApproval(
        {
          installation: options.installation ?? INSTALLATION.toString('hex'),
          revocation: { handle, name: writtenEntity(handle, REVOCATION_SHAPE).name.toString('hex') },
        },
        {
          label: 'firmware 1',
          pcrSelection: options.selection ?? PCRS,
          pcrs: { 'sha256:0': pcr0, 'sha256:7': options.pcr7 ?? pcr7 },
          counter: options.counter ?? 5n,
          createdAt: new Date(),
        },
      );
      return signApproval(request, (options.by ?? AUTHORITY).privateKey);
    };
    const withApprovals = (...approvals: unknown[]): Evidence => ({
      ...tpm.evidence(over),
      approvals: approvals.map((one) => Buffer.from(JSON.stringify(one))),
    });

    it('holds with an approval that counts now, whatever comes beside it', () => {
      const evidence = withApprovals({}, null, 'x', approval({ counter: 4n }), approval());
      assert.match(verifyEvidence(peer, evidence, over).approvedBy, /policy authority as "firmware 1"/);
      assert.ok(verifyEvidence(peer, withApprovals(approval({ selection: 'sha256:7,0' })), over));
    });

    it('with a revoked approval: approval-stale', () => {
      const stale = /"firmware 1" of the platform of the host "b" was revoked/;
      refusedAs(
        'approval-stale',
        withApprovals(approval({ counter: 4n }), approval({ counter: 1n })),
        stale,
        peer,
      );
      refusedAs('peer-platform', withApprovals(approval({ counter: 6n })), /was not finished/, peer);
    });

    it('with an approval of somebody else, for another host or of other values: peer-platform', () => {
      const none = /no approval of its policy authority is for it/;
      for (const other of [
        approval({ by: STRANGER }),
        approval({ installation: '00'.repeat(16) }),
        approval({ handle: tpm.handle + 1 }),
        approval({ pcr7: '00'.repeat(32) }),
        { ...approval({ counter: 4n }), counter: '5' },
      ]) {
        refusedAs('peer-platform', withApprovals(other), none, peer);
      }
      refusedAs('peer-platform', withApprovals(), none, peer);
      refusedAs('peer-platform', withApprovals(approval()), none, { ...peer, installation: Buffer.alloc(0) });
      refusedAs('peer-platform', withApprovals(...Array(65).fill(approval())), /more than 64/, peer);
    });

    it('needs what its TPM says of the revocation counter in this session', () => {
      const evidence = withApprovals(approval());
      const none = { ...evidence, revocationAttest: Buffer.alloc(0) };
      refusedAs('peer-platform', none, /does not show which approvals/, peer);
      const say = (session: Buffer, name: Buffer, by = tpm) => {
        const nvContents = Buffer.from('0000000000000005', 'hex');
        const { attest, signature } = by.say(St.ATTEST_NV, session, {
          indexName: name,
          offset: 0,
          nvContents,
        });
        return { ...evidence, revocationAttest: attest, revocationSignature: signature };
      };
      const { name } = writtenEntity(tpm.handle, REVOCATION_SHAPE);
      assert.ok(verifyEvidence(peer, say(over, name), over));
      refusedAs('peer-unattested', say(transcript(), name), /made for another nonce/, peer);
      refusedAs('peer-unattested', say(over, name, new LyingTpm()), /does not verify/, peer);
      const other = writtenEntity(tpm.handle + 1, REVOCATION_SHAPE).name;
      refusedAs('peer-unattested', say(over, other), /of another index/, peer);
      tpm.boot = { ...tpm.boot, resetCount: tpm.boot.resetCount + 1 };
      const later = say(over, name);
      tpm.boot = { ...tpm.boot, resetCount: tpm.boot.resetCount - 1 };
      refusedAs('peer-restarted', later, undefined, peer);
    });
  });

  it('I-10 is refused by name, whatever bytes it is', () => {
    const peers = [tpm.peer, { ...tpm.peer, platforms: [], policyAuthority: AUTHORITY.publicKey }];
    const noise = fc.uint8Array({ maxLength: 300 });
    // Whole, cut, grown, with bytes changed, or anything.
    const near = (bytes: Uint8Array) =>
      fc.oneof(
        fc.constant(bytes),
        noise,
        fc.nat(bytes.length).map((size) => bytes.subarray(0, size)),
        noise.map((more) => Buffer.concat([bytes, more])),
        fc.tuple(fc.nat(Math.max(0, bytes.length - 1)), noise).map(([at, by]) => {
          const changed = Buffer.from(bytes);
          changed.set(by.subarray(0, changed.length - at), at);
          return changed;
        }),
      );
    const evidence: fc.Arbitrary<Evidence> = fc.record({
      attest: near(good.attest),
      signature: near(good.signature),
      pcrSelection: fc.oneof(
        fc.constant(PCRS),
        fc.string(),
        fc.constantFrom('sha256:0', 'sha384:7+sha256:0'),
      ),
      pcrValues: fc.oneof(fc.constant<Uint8Array[]>(good.pcrValues), fc.array(noise, { maxLength: 4 })),
      approvals: fc.array(
        fc.oneof(
          noise,
          fc.json().map((text) => Buffer.from(text)),
        ),
        { maxLength: 4 },
      ),
      revocationAttest: near(good.revocationAttest),
      revocationSignature: near(good.revocationSignature),
      challengeAnswer: noise,
    });
    const named = new Set<ManagerErrorCode>([
      'peer-unattested',
      'peer-platform',
      'peer-restarted',
      'approval-stale',
    ]);
    fc.assert(
      fc.property(evidence, fc.constantFrom(...peers), near(tpm.peer.attestationKey), (sent, kept, key) => {
        for (const peer of [kept, { ...kept, attestationKey: key }]) {
          try {
            verifyEvidence(peer, sent, over);
            assert.deepEqual(Buffer.from(sent.attest), good.attest);
          } catch (error) {
            assert.ok(isA(error, ManagerError), String(error));
            assert.ok(named.has(error.code) || (peer !== kept && error.code === 'peer-ak'), error.code);
          }
        }
      }),
    );
  });

  describe('from a TPM', () => {
    const chip = new Chip();

    it('holds for the host that made it, until its platform changes', async () => {
      const { enrolment } = await chip.enrol();
      const [host, first] = await chip.root(async (root) => {
        const made = await hostOf(root, enrolment);
        return [made, await evidenceOf(root, made, over)] as const;
      });
      const { pcrDigest } = readPlatform(host.peer, first, over);
      const peer = { ...host.peer, platforms: [{ pcrSelection: PCRS, pcrDigest, approvedAt: 1n }] };
      const facts = verifyEvidence(peer, first, over);
      const again = () => chip.root((root) => evidenceOf(root, host, over));
      requireSameBoot(peer, facts.boot, verifyEvidence(peer, await again(), over).boot);
      await chip.extend(4);
      assert.ok(verifyEvidence(peer, await again(), over), 'a register that is not selected');
      await chip.extend(7);
      const changed = await again();
      assert.throws(() => verifyEvidence(peer, changed, over), refuses('peer-platform'));
      await chip.swtpm.restart();
      const rebooted = verifyEvidence(peer, await again(), over);
      assert.throws(() => requireSameBoot(peer, facts.boot, rebooted.boot), refuses('peer-restarted'));
    });

    it('shows which approvals its revocation counter has left', async () => {
      const { enrolment } = await chip.enrol();
      await chip.root(async (root) => {
        const host = await hostOf(root, enrolment);
        const peer = { ...host.peer, policyAuthority: AUTHORITY.publicKey };
        const { pcrs, counter } = await root.readPlatformState(enrolment);
        const request = { label: 'now', pcrSelection: PCRS, pcrs, counter, createdAt: new Date() };
        const approval = signApproval(requestApproval(enrolment, request), AUTHORITY.privateKey);
        const evidence = await evidenceOf(root, host, over, [approval]);
        assert.match(verifyEvidence(peer, evidence, over).approvedBy, /as "now"/);
        await root.incrementRevocationCounter(enrolment);
        const revoked = await evidenceOf(root, host, over, [approval]);
        assert.throws(
          () => verifyEvidence(peer, revoked, over),
          refuses('approval-stale', /"now".*was revoked/),
        );
        const mixed = { ...revoked, revocationAttest: evidence.revocationAttest };
        assert.throws(() => verifyEvidence(peer, mixed, over), refuses('peer-unattested'));
      });
    });

    it('takes registers of several banks', async () => {
      const { enrolment } = await chip.enrol();
      await chip.root(async (root) => {
        const { attestationKey, peer } = await hostOf(root, enrolment);
        const pcrSelection = 'sha256:0,7+sha384:0';
        const quote = await root.quote(enrolment, attestationKey, pcrSelection, over);
        const { pcrs } = readPlatform(peer, { ...quote, pcrSelection }, over);
        assert.equal(
          Object.keys(pcrs).length,
          parsePcrSelection(pcrSelection).flatMap((bank) => bank.pcrs).length,
        );
        await assert.rejects(
          root.quote(enrolment, attestationKey, PCRS, over.subarray(1)),
          refuses('bad-request', /32 bytes/),
        );
      });
    });
  });
});
