import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import fc from 'fast-check';
import { ManagerError } from 'vtpm-manager/error';
import {
  type HostFacts,
  platformDigest,
  readIdentity,
  renderIdentity,
} from 'vtpm-manager/peer/identity-file';
import { type SigningKey, signingKeyFromSeed } from 'vtpm-proto';
import { isA } from '../support/is-a.js';
import { LyingTpm } from './peer-fixture.js';
import { refuses } from './root-tpm-fixture.js';

const tpm = new LyingTpm();
const hostKey = signingKeyFromSeed(randomBytes(32));

function facts(changes: Partial<HostFacts> = {}): HostFacts {
  return {
    hostId: hostKey.publicKey,
    tlsKey: randomBytes(32),
    backupKey: randomBytes(32),
    installation: randomBytes(16),
    revocationHandle: 0x01800001,
    tpm: { kind: 'device', manufacturer: 'IFX' },
    endorsementKey: randomBytes(122),
    attestationKey: Buffer.from(tpm.peer.attestationKey),
    certificates: [randomBytes(700)],
    createdAt: '2026-11-22T01:02:03.004Z',
    ...changes,
  };
}

const render = (of: HostFacts, about = of, key: SigningKey = hostKey): string =>
  renderIdentity(of, tpm.evidence(platformDigest(about)), key);

describe('the identity of a host', () => {
  const good = facts();
  const text = render(good);

  it('is one line, and says what it was made of', () => {
    assert.ok(!text.includes('\n'));
    for (const shown of [text, `${text}\n`, `  ${text}\r\n`]) {
      const read = readIdentity(shown);
      assert.deepEqual(read.facts, good);
      assert.equal(read.platform.pcrSelection, tpm.evidence(randomBytes(32)).pcrSelection);
    }
  });

  it('says so whatever is in it', () => {
    const bytes = (length: number) =>
      fc.uint8Array({ minLength: length, maxLength: length }).map((each) => Buffer.from(each));
    const some = fc.uint8Array({ minLength: 1, maxLength: 1000 }).map((each) => Buffer.from(each));
    const plain = { noNullPrototype: true };
    const word = fc.string({ minLength: 1, maxLength: 100, unit: 'grapheme-ascii' });
    fc.assert(
      fc.property(
        fc.record(
          {
            tlsKey: bytes(32),
            backupKey: bytes(32),
            installation: bytes(16),
            revocationHandle: fc.integer({ min: 0x01000000, max: 0x01ffffff }),
            tpm: fc.record({ kind: word, manufacturer: word }, plain),
            endorsementKey: some,
            certificates: fc.array(some, { maxLength: 16 }),
          },
          plain,
        ),
        (changes) => {
          const made = facts(changes);
          assert.deepEqual(readIdentity(render(made)).facts, made);
        },
      ),
      { numRuns: 50 },
    );
  });

  it('is refused with any character of it another, or left out, or twice', () => {
    fc.assert(
      fc.property(
        fc.nat(text.length - 1),
        fc.constantFrom('change', 'remove', 'repeat', 'cut'),
        fc.string({ minLength: 1, maxLength: 1 }),
        (at, how, other) => {
          const rest = text.slice(at + 1);
          const changed =
            how === 'change'
              ? text.slice(0, at) + other + rest
              : how === 'remove'
                ? text.slice(0, at) + rest
                : how === 'repeat'
                  ? text.slice(0, at + 1) + text.slice(at)
                  : text.slice(0, at);
          fc.pre(changed.trim() !== text);
          assert.throws(
            () => readIdentity(changed),
            (error) => isA(error, ManagerError) && ['bad-request', 'newer-format'].includes(error.code),
          );
        },
      ),
      { numRuns: 400 },
    );
  });

  it('is refused by name where it is something else', () => {
    const json = JSON.parse(text) as Record<string, unknown>;
    const edited = (changes: object) => JSON.stringify({ ...json, ...changes });
    for (const [what, said] of [
      ['', /not one line of JSON/],
      ['-----BEGIN CERTIFICATE-----', /not one line of JSON/],
      ['[]', /"it" is no object/],
      ['{}', /does not begin as/],
      [edited({ 'vtpm-peer': '1' }), /does not begin as/],
      [edited({ hostId: 'ab' }), /"hostId" is not 64 hex digits/],
      [edited({ hostId: 7 }), /"hostId" is not 64 hex digits/],
      [edited({ tlsKey: undefined }), /"tlsKey" is not 64 hex digits/],
      [edited({ revocationHandle: 0x81000001 }), /"revocationHandle" is no handle/],
      [edited({ tpm: [] }), /"tpm" is no object/],
      [edited({ tpm: { kind: 'device', manufacturer: '\u001b[2J' } }), /"tpm.manufacturer" is no text/],
      [edited({ endorsementKey: 'a' }), /"endorsementKey" is no base64/],
      [edited({ certificates: Array(17).fill('AAAA') }), /"certificates" is no list of at most 16/],
      [edited({ createdAt: 'today' }), /"createdAt" is no time/],
      [edited({ platform: null }), /"platform" is no object/],
      [edited({ colour: 'red' }), /changed on its way/],
      [edited({ tlsKey: 'ab'.repeat(32) }), /its signature does not verify/],
      [JSON.stringify(json, null, 1), /changed on its way/],
      [text.replace('"tlsKey"', '"hostId":"","tlsKey"'), /changed on its way|hostId/],
      [`${text} ${text}`, /not one line of JSON/],
      [' '.repeat(10) + 'x'.repeat(70_000), /more than 65536 characters/],
    ] as const) {
      assert.throws(() => readIdentity(what), refuses('bad-request', said), what.slice(0, 80));
    }
    assert.throws(() => readIdentity(edited({ 'vtpm-peer': 2 })), refuses('newer-format', /format 2/));
  });

  it('is refused where another key has signed it than the host it names', () => {
    const stranger = signingKeyFromSeed(randomBytes(32));
    assert.throws(() => readIdentity(render(good, good, stranger)), refuses('bad-request', /signature/));
  });

  it('is refused where its TPM has vouched for another host, or another TPM for it', () => {
    // A man in the middle puts his keys in, signs, and leaves the quote: it is over what was there before.
    assert.throws(() => readIdentity(render(facts(), good)), refuses('peer-unattested', /another nonce/));
    const other = new LyingTpm();
    const made = facts();
    const quoted = renderIdentity(made, other.evidence(platformDigest(made)), hostKey);
    assert.throws(() => readIdentity(quoted), refuses('peer-unattested', /signature does not verify/));
  });

  it('is refused where its attestation key is none', () => {
    const made = facts({ attestationKey: randomBytes(90) });
    assert.throws(() => readIdentity(render(made)), refuses('peer-ak'));
  });
});
