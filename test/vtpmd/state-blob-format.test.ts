import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import fc from 'fast-check';
import type { VtpmdErrorCode } from 'vtpmd/error';
import { decodeBlob, encodeBlob, MAX_BLOB_BYTES } from 'vtpmd/state-blob/swtpm-format';
import { refused } from '../support/refused.js';
import { type Swtpm, startSwtpm } from '../support/swtpm.js';
import { removeDirectory, temporaryDirectory } from '../toolstack/supervisor-fixture.js';

const MAGIC = { permanent: 0xab364723, volatile: 0x45637889 } as const;
type Type = keyof typeof MAGIC;

/** A state as libtpms begins them. */
function stateOf(type: Type, content: Uint8Array): Buffer {
  const head = Buffer.alloc(8);
  head.writeUInt16BE(3, 0);
  head.writeUInt32BE(MAGIC[type], 2);
  head.writeUInt16BE(3, 6);
  return Buffer.concat([head, content]);
}

const type = fc.constantFrom<Type>('permanent', 'volatile');
const content = fc.uint8Array({ maxLength: 3000 });

/** Header and items, as the tests below spoil them. */
function blob(
  header: { version?: number; least?: number; flags?: number },
  ...items: [number, Uint8Array][]
): Buffer {
  const body = Buffer.concat(items.map(([tag, data]) => item(tag, data)));
  const head = Buffer.alloc(10);
  head.writeUInt8(header.version ?? 2, 0);
  head.writeUInt8(header.least ?? 1, 1);
  head.writeUInt16BE(10, 2);
  head.writeUInt16BE(header.flags ?? 4, 4);
  head.writeUInt32BE(10 + body.length, 6);
  return Buffer.concat([head, body]);
}

function item(tag: number, data: Uint8Array): Buffer {
  const head = Buffer.alloc(6);
  head.writeUInt16BE(tag, 0);
  head.writeUInt32BE(data.length, 2);
  return Buffer.concat([head, data]);
}

describe("swtpm's format of state blobs", () => {
  it('gives back what was put into it', () => {
    fc.assert(
      fc.property(type, content, (kind, bytes) => {
        const state = stateOf(kind, bytes);
        const encoded = encodeBlob(state);
        assert.equal(encoded.length, state.length + 22);
        assert.deepEqual(decodeBlob(kind, encoded), state);
      }),
    );
  });

  it('refuses anything cut short or with bytes behind it', () => {
    fc.assert(
      fc.property(
        type,
        content,
        fc.nat(),
        fc.uint8Array({ minLength: 1, maxLength: 20 }),
        (kind, bytes, cut, more) => {
          const encoded = encodeBlob(stateOf(kind, bytes));
          const short = encoded.subarray(0, cut % encoded.length);
          assert.throws(() => decodeBlob(kind, short), refused('blob-malformed'));
          assert.throws(() => decodeBlob(kind, Buffer.concat([encoded, more])), refused('blob-malformed'));
        },
      ),
    );
  });

  it('reads any bytes, and any flipped bit of its frame, without another error than its own', () => {
    const codes = ['blob-malformed', 'blob-encrypted', 'newer-format'] as const;
    const tries = (kind: Type, bytes: Buffer): void => {
      try {
        decodeBlob(kind, bytes);
      } catch (error) {
        refused(...codes)(error);
      }
    };
    fc.assert(
      fc.property(type, fc.uint8Array({ maxLength: 200 }), (kind, bytes) => tries(kind, Buffer.from(bytes))),
    );
    fc.assert(
      fc.property(type, content, fc.nat({ max: 30 * 8 - 1 }), (kind, bytes, bit) => {
        const encoded = encodeBlob(stateOf(kind, bytes));
        encoded[bit >> 3] = (encoded[bit >> 3] ?? 0) ^ (1 << (bit & 7));
        tries(kind, encoded);
      }),
    );
  });

  const state = stateOf('permanent', Buffer.from('content'));
  const cases: [string, VtpmdErrorCode, Buffer][] = [
    ['a header flag that says encrypted', 'blob-encrypted', blob({ flags: 5 }, [4, item(1, state)])],
    [
      'a header flag that says encrypted for migration',
      'blob-encrypted',
      blob({ flags: 6 }, [4, item(1, state)]),
    ],
    ['encrypted data', 'blob-encrypted', blob({}, [4, item(2, state)])],
    ['encrypted migration data', 'blob-encrypted', blob({}, [5, item(1, state)])],
    ['a format for later readers', 'newer-format', blob({ version: 3, least: 3 }, [4, item(1, state)])],
    ['the format before items', 'blob-malformed', blob({ version: 1 }, [4, item(1, state)])],
    ['no state', 'blob-malformed', blob({}, [4, item(3, state)])],
    ['nothing', 'blob-malformed', blob({})],
    ['the state twice', 'blob-malformed', blob({}, [4, Buffer.concat([item(1, state), item(1, state)])])],
    [
      'an item that is longer than what it stands in',
      'blob-malformed',
      blob({}, [4, item(1, state).subarray(0, -1)]),
    ],
    [
      'a state that ends within its own header',
      'blob-malformed',
      blob({}, [4, item(1, state.subarray(0, 7))]),
    ],
    ['more than swtpm takes', 'blob-malformed', encodeBlob(Buffer.alloc(MAX_BLOB_BYTES))],
    ['the other kind of state', 'blob-malformed', encodeBlob(stateOf('volatile', Buffer.from('content')))],
  ];
  for (const [what, code, bytes] of cases) {
    it(`refuses ${what}`, () => assert.throws(() => decodeBlob('permanent', bytes), refused(code)));
  }

  it('takes a later version that earlier readers know, and items that it does not know', () => {
    const later = blob(
      { version: 3, least: 2 },
      [99, Buffer.from('new')],
      [4, Buffer.concat([item(98, state), item(1, state)])],
    );
    assert.deepEqual(decodeBlob('permanent', later), state);
  });

  describe('a real swtpm', () => {
    let swtpm: Swtpm;
    before(async () => {
      swtpm = await startSwtpm();
    });
    after(() => swtpm.stop());

    const ioctl = (...args: string[]): void => {
      execFileSync('swtpm_ioctl', ['--unix', swtpm.control, ...args], { stdio: 'pipe' });
    };

    for (const kind of ['permanent', 'volatile'] as const) {
      it(`gives its ${kind} state in these very bytes, and takes them`, () => {
        const file = join(swtpm.directory, kind);
        ioctl('--save', kind, file);
        const given = readFileSync(file);
        const read = decodeBlob(kind, given);
        assert.deepEqual(encodeBlob(read), given);
      });
    }

    it('has the same state in its file, which is taken too', () => {
      const file = join(swtpm.directory, 'again');
      ioctl('--save', 'permanent', file);
      const stored = readFileSync(join(swtpm.directory, 'tpm2-00.permall'));
      assert.deepEqual(decodeBlob('permanent', stored), decodeBlob('permanent', readFileSync(file)));
    });
  });

  it('of a swtpm with a migration key is refused by name', async () => {
    const directory = temporaryDirectory();
    const key = join(directory, 'key');
    writeFileSync(key, randomBytes(32).toString('hex'));
    const migrationKey = `file=${key},format=hex,mode=aes-256-cbc`;
    const swtpm = await startSwtpm({ more: ['--migration-key', migrationKey] });
    try {
      const file = join(swtpm.directory, 'encrypted');
      execFileSync('swtpm_ioctl', ['--unix', swtpm.control, '--save', 'permanent', file], { stdio: 'pipe' });
      assert.throws(() => decodeBlob('permanent', readFileSync(file)), refused('blob-encrypted'));
    } finally {
      await swtpm.stop();
      removeDirectory(directory);
    }
  });
});
