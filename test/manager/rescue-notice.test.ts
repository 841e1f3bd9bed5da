import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import fc from 'fast-check';
import { readBackup } from 'vtpm-manager/backup/read';
import { checkFencing, checkStatementFits, MAX_STATEMENT_AGE_MS } from 'vtpm-manager/rescue/fencing';
import { signNotice, verifiedNotice } from 'vtpm-manager/rescue/notice';
import {
  type FencingStatement,
  fencingText,
  parseFencingText,
  type RescueNotice,
  type SignedRescue,
  signFencing,
  signingKeyFromSeed,
  uuidToBytes,
} from 'vtpm-proto';
import { testKeys } from '../support/test-keys.js';
import { BackupDesk } from './backup-fixture.js';
import { refused } from './ownership-fixture.js';

const ID = '11111111-0000-4000-8000-000000000000';
const NOW = 1_800_000_000_000;
const toolstack = signingKeyFromSeed(Buffer.alloc(32, 1));
const trust = { isToolstackKeyTrusted: (key: Uint8Array) => toolstack.publicKey.equals(key) };

describe('a fencing statement', () => {
  const statement = (changes: Partial<FencingStatement> = {}) => ({
    format: 1,
    toolstackKey: toolstack.publicKey,
    vtpmUuid: uuidToBytes(ID),
    host: Buffer.alloc(32, 6),
    lastGeneration: 7n,
    method: 'its power was cut',
    at: BigInt(NOW),
    ...changes,
  });

  it('is believed from a toolstack key that is trusted, while it is fresh', () => {
    for (const age of [0, MAX_STATEMENT_AGE_MS, -60_000]) {
      const signed = signFencing(toolstack, statement({ at: BigInt(NOW - age) }));
      assert.equal(checkFencing(signed, trust, NOW).method, 'its power was cut');
    }
  });

  const other = signingKeyFromSeed(Buffer.alloc(32, 2));
  for (const [what, signed] of [
    ['absent', undefined],
    ['by another key than it names', signFencing(other, statement())],
    ['by a key that is not trusted', signFencing(other, statement({ toolstackKey: other.publicKey }))],
    ['too old', signFencing(toolstack, statement({ at: BigInt(NOW - MAX_STATEMENT_AGE_MS - 1) }))],
    ['of a time to come', signFencing(toolstack, statement({ at: BigInt(NOW + 600_000) }))],
    [
      'of a generation that leaves none after it',
      signFencing(toolstack, statement({ lastGeneration: 2n ** 63n })),
    ],
    ['without a method', signFencing(toolstack, statement({ method: ' ' }))],
    ['of a newer format', signFencing(toolstack, statement({ format: 2 }))],
  ] as const) {
    it(`is refused where it is ${what}: not-fenced`, () => {
      assert.throws(() => checkFencing(signed, trust, NOW), refused('not-fenced'));
    });
  }

  it('is refused for another vTPM, and where it knows less than the backup', () => {
    const fits = (generation: bigint, id = ID) =>
      checkStatementFits(statement(), { vtpmUuid: uuidToBytes(id), generation });
    fits(7n);
    assert.throws(() => fits(8n), refused('not-fenced'));
    assert.throws(() => fits(7n, ID.replaceAll('1', '2')), refused('not-fenced'));
  });

  it('is one line of text, and nothing else passes for one', () => {
    const text = fencingText(signFencing(toolstack, statement()));
    assert.equal(checkFencing(parseFencingText(`${text}\n`), trust, NOW).lastGeneration, 7n);
    fc.assert(
      fc.property(fc.nat(text.length - 1), fc.constantFrom('!', ' ', '\n', '='), (at, character) => {
        const bad = text.slice(0, at) + character + text.slice(at + 1);
        assert.throws(() => checkFencing(parseFencingText(bad), trust, NOW));
      }),
    );
  });
});

describe('a notice of a rescue', () => {
  const desk = new BackupDesk();
  const rescuer = testKeys();
  let proof: Pick<RescueNotice, 'headerDigest' | 'facts' | 'factsSignature'>;

  before(async () => {
    desk.put(ID, 5n, Buffer.from('state'));
    await readBackup(desk.file(await desk.make()), ({ digest }, { facts, signature }) => {
      proof = { headerDigest: digest, facts, factsSignature: signature };
    });
  });
  after(() => desk.clear());

  const notice = (changes: Partial<RescueNotice> = {}, key = rescuer.hostKey): SignedRescue =>
    signNotice(key, {
      vtpmUuid: uuidToBytes(ID),
      source: desk.keys.hostKey.publicKey,
      rescuer: rescuer.hostKey.publicKey,
      epoch: 1n << 32n,
      generation: 1n << 32n,
      at: BigInt(NOW),
      ...proof,
      ...changes,
    });
  const take = (signed: SignedRescue, by = rescuer) =>
    verifiedNotice(signed, {
      hostId: desk.keys.hostKey.publicKey,
      backupKey: desk.keys.backupKey.publicKey,
      rescuer: by.hostKey.publicKey,
    });

  it('is taken from who rescued it, with the backup that this host made', () => {
    assert.equal(take(notice()).epoch, 1n << 32n);
  });

  it('is refused from any other host, about any other host, with any other backup', async () => {
    const stranger = testKeys();
    const strange = { rescuer: stranger.hostKey.publicKey };
    assert.throws(() => take(notice(), stranger), refused('bad-request'));
    assert.throws(() => take(notice(strange)), refused('bad-request'));
    assert.throws(() => take(notice({}, stranger.hostKey)), refused('bad-request'));
    assert.throws(() => take(notice({ source: randomBytes(32) })), refused('bad-request'));
    assert.throws(() => take(notice({ vtpmUuid: randomBytes(16) })), refused('bad-request'));
    assert.throws(() => take(notice({ headerDigest: randomBytes(32) })), refused('bad-request'));
    assert.throws(() => take(notice({ epoch: 3n })), refused('bad-request'));
    for (const epoch of [(1n << 32n) + 1n, 2n ** 64n - 1n]) {
      assert.throws(() => take(notice({ epoch })), refused('bad-request'));
    }
    // A backup of the same vTPM that somebody else made.
    const forger = new BackupDesk();
    forger.put(ID, 5n, Buffer.from('state'));
    let forged: typeof proof | undefined;
    await readBackup(forger.file(await forger.make()), ({ digest }, { facts, signature }) => {
      forged = { headerDigest: digest, facts, factsSignature: signature };
    });
    forger.clear();
    assert.throws(() => take(notice(forged)), refused('bad-request'));
  });

  it('is refused with any one bit flipped', () => {
    const good = notice();
    fc.assert(
      fc.property(fc.constantFrom('notice', 'signature'), fc.nat(), (field, position) => {
        const bad = { ...good, [field]: Buffer.from(good[field]) };
        const bit = position % (bad[field].length * 8);
        bad[field][bit >> 3]! ^= 1 << (bit & 7);
        assert.throws(() => take(bad));
      }),
    );
  });
});
