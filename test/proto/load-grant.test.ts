import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import fc from 'fast-check';
import { AgreedBox, boxKeyPair, openLoadGrant, ProtoError, sealLoadGrant } from 'vtpm-proto';

describe('Load grants', () => {
  const manager = boxKeyPair();
  const worker = boxKeyPair();
  const given = new AgreedBox(worker.publicKey, manager);
  const taken = new AgreedBox(manager.publicKey, worker);
  const grant = {
    loadId: randomBytes(16),
    sessionId: randomBytes(16),
    sessionKey: randomBytes(32),
    epoch: 3n,
    generation: 7n,
    permanent: randomBytes(9000),
    manufacture: false,
    checkpointKey: randomBytes(32),
    referenceKey: randomBytes(32),
    arrived: false,
  };
  const answer = sealLoadGrant(given, grant);
  const flipped = (bytes: Uint8Array, at: number): Uint8Array =>
    bytes.map((byte, index) => (index === at ? byte ^ 1 : byte));

  it('stand beside the box under a key that is in it', () => {
    assert.ok(grant.permanent.equals(openLoadGrant(taken, answer).permanent));
    assert.ok(answer.box.length < 128);
  });

  it('are also taken in the box, as older managers send them', () => {
    assert.ok(grant.permanent.equals(openLoadGrant(taken, given.seal('LoadGrant', grant)).permanent));
  });

  it('never have the same key, so that their nonce is used once', () => {
    const other = sealLoadGrant(given, grant);
    assert.notDeepEqual(other.sealed, answer.sealed);
    assert.throws(() => openLoadGrant(taken, { ...answer, sealed: other.sealed }), { code: 'forged' });
  });

  it('open for the worker on the ticket alone, from its manager alone', () => {
    const stranger = boxKeyPair();
    for (const box of [
      new AgreedBox(manager.publicKey, stranger),
      new AgreedBox(stranger.publicKey, worker),
    ]) {
      assert.throws(() => openLoadGrant(box, answer), { code: 'forged' });
    }
  });

  it('are refused where one bit of them, of the tag or of the box is another', () => {
    const { sealed } = answer;
    fc.assert(
      fc.property(fc.nat(sealed.length - 1), (at) => {
        assert.throws(() => openLoadGrant(taken, { ...answer, sealed: flipped(sealed, at) }), {
          code: 'forged',
        });
      }),
    );
    for (let at = 0; at < answer.box.length; at++) {
      assert.throws(() => openLoadGrant(taken, { ...answer, box: flipped(answer.box, at) }), {
        code: 'forged',
      });
    }
  });

  it('are refused where they are cut short, or a key stands in the place of a grant', () => {
    const { sealed } = answer;
    for (const length of [0, 15, 16, sealed.length - 1]) {
      assert.throws(
        () => openLoadGrant(taken, { ...answer, sealed: sealed.subarray(0, length) }),
        ProtoError,
      );
    }
    assert.throws(() => openLoadGrant(taken, { nonce: answer.nonce, box: answer.box }), { code: 'forged' });
    const whole = { ...given.seal('LoadGrant', grant), sealed };
    assert.throws(() => openLoadGrant(taken, whole), { code: 'forged' });
  });
});
