import assert from 'node:assert/strict';
import type { Entry, EntryMigration } from 'vtpm-toolstack/supervisor/entry';
import { type ArrivalParts, settleArrival } from 'vtpm-toolstack/supervisor/migration/arrival';
import { type DeskParts, MigrationDesk } from 'vtpm-toolstack/supervisor/migration/desk';

const MIGRATION: EntryMigration = { id: '00'.repeat(16), role: 'arriving', peer: 'a', isNew: true };

describe('what came of an arrival', () => {
  /** @param whileAsked what happens while the manager is asked */
  function parts(
    whileAsked: (entry: { migration: Entry['migration'] }) => void,
    state: { kind: string } = { kind: 'arriving' },
  ) {
    const done: string[] = [];
    const entry = { id: 'x', migration: MIGRATION as Entry['migration'], runningInBoot: null };
    const admin = {
      migration: async () => {
        whileAsked(entry);
        return undefined;
      },
      vtpm: async () => ({ kind: 'live', vmUuid: '', epoch: 2, generation: 7 }),
    };
    const note = (what: string) => (): void => void done.push(what);
    const status = {
      entry,
      state,
      update: note('update'),
      rest: note('rest'),
      log: { info: () => undefined },
    };
    const workers = { isAwaited: false, comesNot: note('comesNot'), resume: note('resume') };
    return { done, parts: { context: { admin }, status, workers } as unknown as ArrivalParts };
  }

  it('is not touched again where its worker came up while the manager was asked', async () => {
    const { done, parts: given } = parts((entry) => {
      entry.migration = null;
    });
    assert.equal(await settleArrival(given), 'here');
    assert.deepEqual(done, []);
  });

  it('does not end one that is served, where only the list could not be written', async () => {
    const { done, parts: given } = parts(() => undefined, { kind: 'running' });
    assert.equal(await settleArrival(given), 'here');
    assert.deepEqual(done, ['update']);
  });

  it('is asked for again and again where nobody was there for the event, but of one that is in hand', async () => {
    let tick = (): void => {};
    const { setInterval } = globalThis;
    globalThis.setInterval = ((run: () => void) => {
      tick = run;
      return { unref: () => undefined };
    }) as unknown as typeof setInterval;
    const asked: string[] = [];
    const vtpm = (name: string, operation?: string) => ({
      entry: { name, migration: MIGRATION },
      operation,
      settled: Promise.resolve(),
      travels: { settle: async () => asked.push(name) },
    });
    const vtpms = [
      vtpm('left'),
      vtpm('in hand', 'taken in'),
      { ...vtpm('at home'), entry: { migration: null } },
    ];
    const desk = new MigrationDesk({ all: () => vtpms } as unknown as DeskParts);
    try {
      for (const times of [1, 2]) {
        tick();
        await new Promise(setImmediate);
        assert.deepEqual(asked, Array(times).fill('left'));
      }
      desk.close();
      tick();
      await new Promise(setImmediate);
      assert.equal(asked.length, 2);
    } finally {
      desk.close();
      globalThis.setInterval = setInterval;
    }
  });

  it('is settled where nobody did that', async () => {
    const { done, parts: given } = parts(() => undefined);
    assert.equal(await settleArrival(given), 'here');
    assert.deepEqual(done, ['update', 'rest']);
  });
});
