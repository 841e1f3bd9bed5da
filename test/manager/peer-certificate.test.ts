import assert from 'node:assert/strict';
import { randomBytes, X509Certificate } from 'node:crypto';
import fc from 'fast-check';
import { tlsIdentity } from 'vtpm-manager/peer/certificate';

describe('the certificate of a host', () => {
  it('is one that OpenSSL reads: self-signed, Ed25519, without an end', () => {
    fc.assert(
      fc.property(fc.uint8Array({ minLength: 32, maxLength: 32 }), (seed) => {
        const { certificate, publicKey } = tlsIdentity(seed);
        const read = new X509Certificate(certificate);
        assert.equal(read.subject, 'CN=vtpm.v1 peer');
        assert.equal(read.issuer, read.subject);
        assert.ok(read.verify(read.publicKey));
        assert.equal(read.publicKey.asymmetricKeyType, 'ed25519');
        assert.deepEqual(read.publicKey.export({ format: 'der', type: 'spki' }).subarray(-32), publicKey);
        assert.equal(read.validTo, 'Dec 31 23:59:59 9999 GMT');
        assert.equal(read.serialNumber, '01');
        assert.equal(read.ca, false);
        assert.deepEqual(read.keyUsage, undefined);
      }),
      { numRuns: 50 },
    );
  });

  it('is the same each time, and another for another key', () => {
    const seed = randomBytes(32);
    assert.equal(tlsIdentity(seed).certificate, tlsIdentity(seed).certificate);
    assert.notEqual(tlsIdentity(seed).certificate, tlsIdentity(randomBytes(32)).certificate);
  });
});
