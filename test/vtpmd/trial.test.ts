import assert from 'node:assert/strict';
import { startEngine, startupClear, type TpmEngine } from 'vtpmd';
import { Trials } from 'vtpmd/worker/trial';
import {
  counterOf,
  getRandom,
  nvDefineCounter,
  nvIncrement,
  nvReadCounter,
  responseCode,
} from '../support/tpm-commands.js';

const INDEX = 0x01500001;

describe('trials of commands', () => {
  let engine: TpmEngine;

  beforeEach(() => {
    engine = startEngine({ manufacture: true });
    engine.process(startupClear());
  });

  afterEach(() => engine.terminate());

  const random = (): string => Buffer.from(engine.process(getRandom(32)).response).toString('hex');

  it('I-8 give no random number twice, however often they are undone', () => {
    const trials = new Trials(engine);
    const seen = new Set<string>();
    for (let round = 0; round < 5; round++) {
      const trial = trials.begin();
      seen.add(random());
      trial.undo();
    }
    assert.equal(seen.size, 5);
    assert.ok(trials.mustStir, 'what comes next is stirred');
  });

  it('(positive control) the engine alone repeats them', () => {
    const snapshot = engine.snapshot();
    const first = random();
    engine.restore(snapshot);
    assert.equal(random(), first);
  });

  it('are kept or undone', () => {
    const trials = new Trials(engine);
    engine.process(nvDefineCounter(INDEX));
    engine.process(nvIncrement(INDEX));
    const before = engine.snapshot();
    const undone = trials.begin();
    assert.ok(engine.process(nvIncrement(INDEX)).stored);
    undone.undo();
    assert.deepEqual(engine.snapshot().permanent, before.permanent);
    const kept = trials.begin();
    assert.equal(responseCode(engine.process(nvIncrement(INDEX)).response), 0);
    kept.keep();
    assert.equal(trials.mustStir, false);
    assert.equal(counterOf(engine.process(nvReadCounter(INDEX)).response), 2n);
  });
});
