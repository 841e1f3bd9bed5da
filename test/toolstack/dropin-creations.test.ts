import assert from 'node:assert/strict';
import { Creations } from 'vtpm-toolstack/supervisor/dropin/creations';

describe('creations for the drop-in', () => {
  it('are two at a time, the others in their order', async () => {
    const creations = new Creations();
    const begun: number[] = [];
    const turns = [0, 1, 2, 3].map(async (n) => {
      const done = await creations.turn();
      begun.push(n);
      return done;
    });
    const first = await turns[0];
    await turns[1];
    assert.deepEqual(begun, [0, 1]);
    first?.();
    const third = await turns[2];
    assert.deepEqual(begun, [0, 1, 2]);
    third?.();
    await turns[3];
  });

  it("are one at a time for a user's place", () => {
    const creations = new Creations();
    const free = creations.reserve(1, '/a');
    creations.reserve(2, '/a');
    assert.throws(() => creations.reserve(1, '/a'), { code: 'busy' });
    free();
    creations.reserve(1, '/a');
  });
});
