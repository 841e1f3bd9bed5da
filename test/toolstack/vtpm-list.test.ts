import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { mkdirSync, readdirSync, readFileSync, rmdirSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import fc from 'fast-check';
import type { ToolstackError } from 'vtpm-toolstack/error';
import { DOOR_KINDS } from 'vtpm-toolstack/supervisor/door-kinds';
import { type Entry, parseEntry } from 'vtpm-toolstack/supervisor/entry';
import { LIST_FORMAT, VtpmList } from 'vtpm-toolstack/supervisor/vtpm-list';
import { removeDirectory, temporaryDirectory } from './supervisor-fixture.js';

const uuid = fc.uuid();
const base64 = fc.uint8Array({ maxLength: 200 }).map((bytes) => Buffer.from(bytes).toString('base64'));
const entry: fc.Arbitrary<Entry> = fc.record({
  id: uuid,
  name: fc.stringMatching(/^[a-z0-9][a-z0-9._-]{0,62}$/),
  vmUuid: uuid,
  isolation: fc.constantFrom('sandbox' as const, 'none' as const),
  autostart: fc.boolean(),
  startup: fc.constantFrom('clear' as const, 'none' as const),
  doors: fc.uniqueArray(fc.constantFrom(...DOOR_KINDS), { minLength: 1 }),
  stateBlobs: fc.constantFrom('reference' as const, 'plain' as const),
  socketOwner: fc.option(fc.tuple(fc.nat(), fc.nat()).map(([uid, gid]) => `${uid}:${gid}`)),
  socketMode: fc.constantFrom('0600', '0660'),
  dropin: fc.option(
    fc.record(
      {
        secretSha256: fc.stringMatching(/^[0-9a-f]{64}$/),
        uid: fc.nat(),
        place: fc.string().map((path) => `/${path.replaceAll('\0', '')}`),
      },
      { noNullPrototype: true },
    ),
  ),
  migration: fc.option(
    fc.record(
      {
        id: fc.stringMatching(/^[0-9a-f]{32}$/),
        role: fc.constantFrom('departing' as const, 'arriving' as const),
        peer: fc.string({ minLength: 1, maxLength: 256 }),
        isNew: fc.boolean(),
      },
      { noNullPrototype: true },
    ),
  ),
  moved: fc.option(
    fc.record(
      {
        to: fc.string({ minLength: 1, maxLength: 256 }),
        at: fc.date({ noInvalidDate: true }).map((date) => date.toISOString()),
      },
      { noNullPrototype: true },
    ),
  ),
  delegation: base64,
  delegationSignature: base64,
  manufactured: fc.boolean(),
  vmRunId: fc.option(uuid),
  epoch: fc.option(fc.nat()),
  runningInBoot: fc.option(fc.stringMatching(/^[0-9a-f]{32}$/)),
  crashed: fc.option(fc.string()),
  restart: fc.constant('never' as const),
});
const entries = fc
  .uniqueArray(entry, { selector: (item) => item.id, maxLength: 5 })
  .map((items) => items.map((item, index) => ({ ...item, name: `${index}${item.name}`.slice(0, 63) })));

describe('the list of vTPMs', () => {
  let directory: string;
  let path: string;
  beforeEach(() => {
    directory = temporaryDirectory();
    path = join(directory, 'vtpms.json');
  });
  afterEach(() => removeDirectory(directory));

  function write(items: readonly Entry[]): VtpmList {
    const list = VtpmList.create(path);
    for (const item of items) list.add(item);
    return list;
  }
  const hasCode = (code: string) => (error: unknown) => (error as ToolstackError).code === code;

  it('reads back what was added, changed and removed', () => {
    fc.assert(
      fc.property(entries, (items) => {
        const list = write(items);
        assert.deepEqual(VtpmList.open(path)?.all(), items);
        const [first] = items;
        if (!first) return;
        const changed = list.update(first.id, { manufactured: true, epoch: 9, crashed: 'x' });
        assert.deepEqual(VtpmList.open(path)?.get(first.id), changed);
        list.remove(first.id);
        assert.deepEqual(VtpmList.open(path)?.all(), items.slice(1));
      }),
      { numRuns: 30 },
    );
  });

  it('never reads a damaged file as something else (I-9)', () => {
    fc.assert(
      fc.property(entries, fc.nat(), fc.nat({ max: 7 }), fc.nat(), (items, at, bit, cut) => {
        write(items);
        const good = readFileSync(path);
        const flipped = Buffer.from(good);
        flipped.writeUInt8(flipped.readUInt8(at % good.length) ^ (1 << bit), at % good.length);
        for (const damaged of [flipped, good.subarray(0, cut % (good.length - 1))]) {
          writeFileSync(path, damaged);
          let read: Entry[] | undefined;
          try {
            read = VtpmList.open(path)?.all();
          } catch (error) {
            // A flipped bit can make the format number 3, or any other.
            assert.ok(['corrupt', 'newer-format'].includes((error as ToolstackError).code));
            continue;
          }
          // Only white space is left to be damaged.
          assert.deepEqual(read, items);
        }
      }),
      { numRuns: 60 },
    );
  });

  it('never reads a damaged journal as something else, and one without its end as what was there before (I-9)', () => {
    fc.assert(
      fc.property(entries, fc.nat(), fc.nat({ max: 7 }), fc.nat(), (items, at, bit, cut) => {
        const [first, ...others] = items;
        if (!first || others.length === 0) return;
        write(items);
        const journal = join(directory, JSON.parse(readFileSync(path, 'utf8')).journal);
        const good = readFileSync(journal);
        assert.equal(String(good).split('\n').length - 1, others.length, 'a line for each change');
        const flipped = Buffer.from(good);
        flipped.writeUInt8(flipped.readUInt8(at % good.length) ^ (1 << bit), at % good.length);
        writeFileSync(journal, flipped);
        // The end of the last line is all that makes it a line.
        if (at % good.length === good.length - 1)
          assert.deepEqual(VtpmList.open(path)?.all(), items.slice(0, -1));
        else assert.throws(() => VtpmList.open(path), hasCode('corrupt'));
        const torn = good.subarray(0, cut % good.length);
        writeFileSync(journal, torn);
        const whole = String(torn).split('\n').length;
        assert.deepEqual(VtpmList.open(path)?.all(), items.slice(0, whole));
        // What goes on from there does not go on behind what is torn.
        const last = items.at(-1)!;
        const list = VtpmList.open(path)!;
        if (whole < items.length) list.add(last);
        assert.deepEqual(VtpmList.open(path)?.get(last.id), last);
        rmSync(journal, { force: true });
        if (whole === items.length) assert.throws(() => VtpmList.open(path), hasCode('corrupt'));
      }),
      { numRuns: 60 },
    );
  });

  it('leaves no journal of a list that could not be written', () => {
    const [first] = fc.sample(entries, 20).find((some) => some.length > 0)!;
    write([first!]).close();
    const list = VtpmList.open(path)!;
    // In the place of the new list, which cannot be made then.
    mkdirSync(`${path}.new`);
    for (let tries = 0; tries < 3; tries++) assert.throws(() => list.update(first!.id, { epoch: 5 }));
    assert.deepEqual(readdirSync(directory).sort(), ['vtpms.json', 'vtpms.json.new']);
    rmdirSync(`${path}.new`);
    list.update(first!.id, { epoch: 6 });
    assert.equal(VtpmList.open(path)?.get(first!.id)?.epoch, 6);
  });

  it('is written whole by the first change of a process, and leaves one journal', () => {
    const items = fc.sample(entries, 20).find((some) => some.length > 2)!;
    const list = write(items);
    const before = statSync(path).ino;
    list.update(items[0]!.id, { epoch: 5 });
    assert.equal(statSync(path).ino, before);
    const again = VtpmList.open(path)!;
    again.update(items[1]!.id, { epoch: 6 });
    assert.notEqual(statSync(path).ino, before);
    assert.equal(readdirSync(directory).length, 2);
    again.close();
    assert.deepEqual(readdirSync(directory), ['vtpms.json']);
    const read = VtpmList.open(path)!;
    assert.deepEqual([read.get(items[0]!.id)?.epoch, read.get(items[1]!.id)?.epoch], [5, 6]);
  });

  it('reads the lists of older formats, whose vTPMs have the doors that there were, and no others without a format', () => {
    const [item] = fc.sample(entry, 1) as [Entry];
    const { migration: _migration, moved: _moved, ...third } = item;
    const { doors: _doors, stateBlobs: _blobs, dropin: _dropin, ...second } = third;
    const later = { migration: null, moved: null };
    const added = { stateBlobs: 'reference', dropin: null, ...later };
    const { socketOwner: _owner, socketMode: _mode, ...old } = second;
    const doors = ['tpm', 'tcti'];
    const save = (format: number, vtpms: object[]) => {
      // Since 3 the digest is of everything.
      const content = format >= 3 ? { format, journal: null, vtpms } : { format, vtpms };
      const digested = JSON.stringify(format >= 3 ? content : vtpms);
      const sha256 = createHash('sha256').update(digested).digest('hex');
      writeFileSync(path, JSON.stringify({ ...content, sha256 }));
    };
    save(1, [old]);
    assert.deepEqual(VtpmList.open(path)?.all(), [
      { ...old, doors, ...added, socketOwner: null, socketMode: '0600' },
    ]);
    save(2, [second]);
    assert.deepEqual(VtpmList.open(path)?.all(), [{ ...second, doors, ...added }]);
    save(3, [third]);
    assert.deepEqual(VtpmList.open(path)?.all(), [{ ...third, ...later }]);
    // A field that a format does not have, and one that it must have.
    save(1, [item]);
    assert.throws(() => VtpmList.open(path), hasCode('corrupt'));
    for (const [format, vtpm] of [
      [2, item],
      [2, old],
      [3, second],
      [3, item],
      [4, third],
      [0, old],
      [1.5, old],
    ] as const) {
      save(format, [vtpm]);
      assert.throws(() => VtpmList.open(path), hasCode('corrupt'), String(format));
    }
  });

  it('refuses a newer format by name, and is undefined only where there is no file', () => {
    assert.equal(VtpmList.open(path), undefined);
    writeFileSync(path, JSON.stringify({ format: LIST_FORMAT + 1, anything: true }));
    assert.throws(() => VtpmList.open(path), hasCode('newer-format'));
    writeFileSync(path, '');
    assert.throws(() => VtpmList.open(path), hasCode('corrupt'));
  });

  it('keeps ids and names apart, and keeps what it had where a change is refused', () => {
    const [one] = fc.sample(entry, 1) as [Entry];
    const list = write([one]);
    const other = { ...one, id: one.id.replace(/^./, one.id.startsWith('0') ? '1' : '0') };
    assert.throws(() => list.add(other), hasCode('name-taken'));
    assert.throws(() => list.add({ ...one, name: `${one.name.slice(0, 62)}x` }), hasCode('name-taken'));
    assert.deepEqual(list.all(), [one]);
    removeDirectory(directory);
    assert.throws(() => list.update(one.id, { epoch: 77 }));
    assert.notEqual(list.get(one.id)?.epoch, 77);
  });

  it('takes no name that could leave its directory or be taken for an option', () => {
    const [one] = fc.sample(entry, 1) as [Entry];
    for (const name of ['', '.', '..', '-a', 'a/b', 'A', 'a b', 'a\n', `a${'b'.repeat(63)}`, 'ä']) {
      assert.throws(() => parseEntry({ ...one, name }), hasCode('bad-request'), name);
    }
  });
});
