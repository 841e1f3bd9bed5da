import assert from 'node:assert/strict';
import fc from 'fast-check';
import { ToolstackError } from 'vtpm-toolstack/error';
import { DOOR_NAMES } from 'vtpm-toolstack/supervisor/control-protocol';
import { HANDOVER_FORMAT, type HandOverState, parseHandOver } from 'vtpm-toolstack/supervisor/handover/state';
import { isA } from '../support/is-a.js';

const fd = fc.integer({ min: 3, max: 100_000 });
const digits = (length: number) =>
  fc.string({ unit: fc.constantFrom(...'0123456789abcdef'), minLength: length, maxLength: length });
const processes = fc.array(fc.record({ pid: fc.nat(), startTime: fc.nat().map(String) }), {
  minLength: 1,
  maxLength: 4,
});
const run = fc.record({
  memory: fd,
  pipe: fc.record({ read: fd, write: fd }),
  controlPipe: fc.option(fc.record({ read: fd, write: fd })),
  newest: fc.nat(),
  futile: fc.nat(),
  answers: fc.nat(),
  clientsGone: fc.array(fc.nat()),
  lost: fc.option(fc.string()),
});
const door = fc.constantFrom(...DOOR_NAMES);
const served = fc.record({
  run,
  worker: fc.record({
    processes,
    startedAt: fc
      .date({ min: new Date(0), max: new Date('2999-01-01'), noInvalidDate: true })
      .map((date) => date.toISOString()),
    imageDigest: digits(64),
    confinement: fc.record({
      uid: fc.option(fc.nat()),
      groups: fc.array(
        fc.nat().map((n) => `/group/${n}`),
        { maxLength: 3 },
      ),
    }),
    control: fc.option(fd),
    descriptors: fd,
    output: fc.option(fd),
    pending: fc.uint8Array({ maxLength: 100 }).map((bytes) => Buffer.from(bytes).toString('base64')),
    link: fc.constantFrom('linked', 'wanting', 'passed'),
    failure: fc.option(fc.record({ reason: fc.string(), message: fc.string() })),
    saidStopped: fc.boolean(),
  }),
  doors: fc.record({
    nextId: fc.nat(),
    servers: fc.dictionary(door, fd),
    connections: fc.array(
      fc.record({
        id: fc.nat(),
        door,
        peer: fc.option(fc.nat()),
        fd,
      }),
    ),
    clients: processes,
  }),
});
const vmm = fc.option(
  fc.record({
    connected: fc.boolean(),
    power: fc.constantFrom('on', 'off'),
    bufferSize: fc.nat(),
    locality: fc.nat(),
  }),
);
const vtpm = fc.oneof(
  fc.record({
    id: fc.uuid(),
    vmm,
    state: fc.constantFrom('running', 'lost'),
    reason: fc.option(fc.string()),
    lingering: fc.constant([]),
    served,
  }),
  fc.record({
    id: fc.uuid(),
    vmm,
    state: fc.constant('restarting'),
    reason: fc.string(),
    lingering: processes,
    served: served.map((parts) => ({ ...parts, worker: null })),
  }),
  fc.record({
    id: fc.uuid(),
    vmm,
    state: fc.constantFrom('stopped', 'crashed'),
    reason: fc.option(fc.string()),
    lingering: processes,
    served: fc.constant(null),
  }),
);
const state = fc.record({
  format: fc.constant(HANDOVER_FORMAT),
  version: fc.constant('0.1.0'),
  pid: fc.nat(),
  boot: digits(32),
  times: fc.nat(),
  descriptors: fc.array(fd),
  locks: fc.array(fd, { maxLength: 2 }),
  confinements: fc.record({ uidLock: fc.option(fd), groups: fc.nat() }),
  api: fc.record({ listener: fd, waiting: fc.array(fd), caller: fc.option(fd) }),
  autostart: fc.array(fc.uuid()),
  vtpms: fc.uniqueArray(vtpm, { selector: ({ id }) => id, maxLength: 5 }),
}) as fc.Arbitrary<HandOverState>;

const ID = '00000000-0000-4000-8000-000000000001';
const bytes = (value: unknown): Buffer => Buffer.from(JSON.stringify(value));
const isRefusal = (error: unknown): boolean =>
  isA(error, ToolstackError) && (error.code === 'corrupt' || error.code === 'newer-format');

/** What programs of before do not write. */
const ADDED: ReadonlySet<string | undefined> = new Set(['vmm', 'controlPipe']);

/** Every place in a JSON value, as the keys that lead there. */
function places(value: unknown, at: string[] = []): string[][] {
  if (typeof value !== 'object' || value === null) return [at];
  return [at, ...Object.entries(value).flatMap(([key, item]) => places(item, [...at, key]))];
}

function replaced(value: unknown, [key, ...rest]: string[], change: unknown): unknown {
  if (key === undefined) return change;
  const copy = structuredClone(value) as Record<string, unknown>;
  copy[key] = replaced(copy[key], rest, change);
  return copy;
}

describe('what one supervisor hands over to the next', () => {
  it('is read as it was written', () => {
    fc.assert(
      fc.property(state, (given) => {
        assert.deepEqual(parseHandOver(bytes(given)), JSON.parse(JSON.stringify(given)));
      }),
    );
  });

  it('is read where it is of the format before, in which every vTPM had three doors', () => {
    const [given] = fc.sample(state, 1) as [HandOverState];
    const worker = fc.sample(served, 1)[0]!;
    const doors = { ...worker.doors, servers: { tpm: 10, tcti: 11, 'tcti-ctrl': 12 }, connections: [] };
    const { controlPipe: _, ...run } = worker.run;
    const old = { id: ID, state: 'running', reason: null, lingering: [], served: { ...worker, run, doors } };
    // No VMM powered them.
    const read = { ...old, vmm: null, served: { ...old.served, run: { ...run, controlPipe: null } } };
    const before = { ...given, format: 1, vtpms: [old] };
    assert.deepEqual(parseHandOver(bytes(before)), JSON.parse(JSON.stringify({ ...before, vtpms: [read] })));
  });

  it('is refused by name where it is of a newer format', () => {
    const [given] = fc.sample(state, 1);
    assert.throws(() => parseHandOver(bytes({ ...given, format: HANDOVER_FORMAT + 1, more: 1 })), {
      code: 'newer-format',
      message: /stop it in order and start this one/,
    });
    assert.throws(() => parseHandOver(bytes({ ...given, format: 0 })), { code: 'corrupt' });
  });

  it('I-10 is refused by name where anything in it is something else', () => {
    const wrong = [{ surprise: 1 }, -1, 0.5, true, [[]], 'no such word', undefined];
    fc.assert(
      fc.property(state, fc.nat(), fc.constantFrom(...wrong), (given, pick, change) => {
        const all = places(given);
        const place = all[pick % all.length] as string[];
        const changed = bytes(replaced(given, place, change) ?? null);
        try {
          const read = parseHandOver(changed);
          // Then it is of the same kind, such as a flag or a sentence, or is read where it is left out.
          const isLeftOut = change === undefined && ADDED.has(place.at(-1));
          const written = JSON.parse(changed.toString());
          assert.deepEqual(read, isLeftOut ? replaced(written, place, null) : written);
        } catch (error) {
          if (!isRefusal(error)) throw error;
        }
      }),
    );
  });

  it('I-10 is refused by name where it is no such thing at all', () => {
    fc.assert(fc.property(fc.uint8Array(), (given) => assert.throws(() => parseHandOver(given), isRefusal)));
    fc.assert(
      fc.property(fc.json(), (given) => assert.throws(() => parseHandOver(Buffer.from(given)), isRefusal)),
    );
  });

  it('is refused where a vTPM stands there twice, or runs without a worker', () => {
    const [given] = fc.sample(state, 1) as [HandOverState];
    const [one] = fc.sample(vtpm, 1) as [HandOverState['vtpms'][number]];
    assert.throws(() => parseHandOver(bytes({ ...given, vtpms: [one, one] })), /names a vTPM twice/);
    const alone = { ...one, state: 'running', served: null };
    assert.throws(() => parseHandOver(bytes({ ...given, vtpms: [alone] })), /does not go with its worker/);
  });
});
