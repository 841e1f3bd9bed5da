import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import fc from 'fast-check';
import { ManagerError, type ManagerErrorCode } from 'vtpm-manager';
import { inspect } from 'vtpm-manager/backup/inspect';
import {
  backupPublicText,
  newBackupKey,
  parseBackupPublic,
  parseBackupSecret,
} from 'vtpm-manager/backup/operator-key';
import { checkRecipient, openEntry, readBackup } from 'vtpm-manager/backup/read';
import { boxKeyPair, decode, uuidToText } from 'vtpm-proto';
import { isA } from '../support/is-a.js';
import { anchorOptions } from '../support/test-keys.js';
import { BackupDesk, partsOf } from './backup-fixture.js';

const A = '0a000000-0000-4000-8000-000000000001';
const B = '0b000000-0000-4000-8000-000000000002';
const C = '0c000000-0000-4000-8000-000000000003';

const refused = (code: ManagerErrorCode, message: RegExp) => (error: unknown) => {
  assert.ok(isA(error, ManagerError), String(error));
  assert.equal(error.code, code);
  assert.match(error.message, message);
  return true;
};

describe('a backup file', () => {
  let desk: BackupDesk;
  let bytes: Buffer;

  before(async () => {
    desk = new BackupDesk();
    desk.put(A, 4n, Buffer.from('state of A'));
    desk.put(B, 9n, Buffer.from('state of B'));
    desk.put(C, 2n, undefined);
    bytes = await desk.make();
  });
  after(() => desk.clear());

  const read = (content: Uint8Array) => readBackup(desk.file(content), () => undefined);

  it('gives back every state to the key that it is for, and the tombstones', async () => {
    const states: Record<string, string> = {};
    const { header, statement } = await readBackup(desk.file(bytes), (start, entry) => {
      const content =
        entry.envelope.length > 0 ? openEntry(desk.operator.secretKey, start, entry) : undefined;
      states[uuidToText(entry.parsed.vtpmUuid)] = content
        ? Buffer.from(decode('BackupContent', content).permanent).toString()
        : entry.parsed.kind;
    });
    assert.deepEqual(states, { [A]: 'state of A', [B]: 'state of B', [C]: 'RETIRED' });
    assert.equal(statement.count, 3);
    assert.equal(header.anchorCounter, 12n);
    checkRecipient(header, desk.operator.secretKey);
  });

  it('I-7 holds no state in the clear', () => {
    assert.equal(bytes.includes('state of'), false);
  });

  it('refuses another key by name', async () => {
    const other = boxKeyPair().secretKey;
    const { header } = await read(bytes);
    assert.throws(() => checkRecipient(header, other), refused('bad-request', /encrypted to another key/));
    await assert.rejects(
      readBackup(desk.file(bytes), (start, entry) => void openEntry(other, start, entry)),
      refused('bad-request', /does not open with this key/),
    );
  });

  it('refuses every flipped bit, without the key', async () => {
    await fc.assert(
      fc.asyncProperty(fc.nat(bytes.length - 1), fc.nat(7), async (at, bit) => {
        const flipped = Buffer.from(bytes);
        flipped[at] = (flipped[at] ?? 0) ^ (1 << bit);
        await assert.rejects(read(flipped), (error) => isA(error, ManagerError) && error.code !== 'internal');
      }),
      { numRuns: 500 },
    );
  });

  it('refuses a part of itself, whatever is missing at the end', async () => {
    await fc.assert(
      fc.asyncProperty(fc.nat(bytes.length - 1), async (length) => {
        await assert.rejects(read(bytes.subarray(0, length)), refused('bad-request', /cut off|no backup/));
      }),
    );
  });

  it('refuses more than itself', async () => {
    await assert.rejects(
      read(Buffer.concat([bytes, Buffer.alloc(1)])),
      refused('bad-request', /follows its end/),
    );
  });

  it('refuses parts that are left out, doubled, exchanged or of another backup', async () => {
    const other = await desk.make();
    const cut = (from: Buffer, part: number) => {
      const starts = partsOf(from);
      return from.subarray(starts[part], starts[part + 1]);
    };
    const start = bytes.subarray(0, partsOf(bytes)[0]);
    const build = (...parts: Buffer[]) => Buffer.concat([start, ...parts]);
    const [header, a, b, c, end] = [0, 1, 2, 3, 4].map((part) => cut(bytes, part)) as [
      Buffer,
      Buffer,
      Buffer,
      Buffer,
      Buffer,
    ];
    await read(build(header, a, b, c, end));
    for (const [name, spoilt] of Object.entries({
      'left out': build(header, a, c, end),
      'left out at the end': build(header, a, b, end),
      doubled: build(header, a, a, b, c, end),
      exchanged: build(header, b, a, c, end),
      'of another backup': build(header, cut(other, 1), b, c, end),
      "another's header": build(cut(other, 0), a, b, c, end),
      "another's end": build(header, a, b, c, cut(other, 4)),
      'no header': build(a, b, c, end),
    })) {
      await assert.rejects(read(spoilt), refused('bad-request', /the backup is damaged/), name);
    }
  });

  it('refuses a format that is newer, and what is no backup', async () => {
    const newer = Buffer.from(bytes);
    newer.writeUInt32BE(2, 15);
    await assert.rejects(read(newer), refused('newer-format', /has format 2, this version reads 1/));
    await assert.rejects(read(randomBytes(300)), refused('bad-request', /no backup/));
  });

  it('is inspected without a key, damaged or not', async () => {
    const options = { sandbox: false, log: anchorOptions(desk.keys).log };
    const whole = await inspect(desk.file(bytes), options);
    assert.equal(whole.verdict, 'ok');
    assert.equal(whole.facts.to, backupPublicText(desk.operator.publicKey));
    assert.deepEqual(
      whole.vtpms.map(({ id, kind, generation, epoch, bytes: size }) => [id, kind, generation, epoch, size]),
      [
        [A, 'live', (1n << 32n) + 4n, 4n, 10],
        [B, 'live', (1n << 32n) + 9n, 4n, 10],
        [C, 'retired', 2n, 3n, 0],
      ],
    );
    const cut = await inspect(desk.file(bytes.subarray(0, bytes.length - 1)), options);
    assert.equal(cut.verdict, 'damaged');
    assert.match(cut.problems.join(), /cut off/);
    assert.equal(cut.vtpms.length, 3);
  });

  it('has keys that say which half they are', () => {
    const key = newBackupKey();
    const { publicKey } = boxKeyPair(parseBackupSecret(`${key.secret}\n`));
    assert.deepEqual(parseBackupPublic(key.public), Buffer.from(publicKey));
    assert.throws(() => parseBackupPublic(key.secret), refused('bad-request', /public half/));
    assert.throws(() => parseBackupSecret(key.public), refused('bad-request', /private half/));
  });
});
