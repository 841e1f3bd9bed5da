import assert from 'node:assert/strict';
import fc from 'fast-check';
import { FrontendPage, STATE as THEIR_STATE } from 'vtpm-frontend-driver';
import { errorResponse, getRandom, MAX_COMMAND_BYTES } from 'vtpmd/engine/command';
import { isAfterClaim, MOST_PAGES, PAGE_BYTES, RingPage, STATE } from 'vtpmd/ring/page';

const pages = fc.integer({ min: 1, max: MOST_PAGES });
const memoryOf = (count: number): Buffer => Buffer.from(new ArrayBuffer(count * PAGE_BYTES));

/** A TPM command of that length. */
function commandOf(length: number, fill: number): Buffer {
  const command = Buffer.alloc(length, fill);
  command.writeUInt16BE(0x8001, 0);
  command.writeUInt32BE(length, 2);
  return command;
}

describe('the page of a ring', () => {
  const out = Buffer.alloc(MAX_COMMAND_BYTES);

  it('carries every command that fits from the frontend to the backend, and the answer back', () => {
    fc.assert(
      fc.property(
        pages,
        fc.integer({ min: 10, max: MAX_COMMAND_BYTES }),
        fc.integer({ min: 10, max: MAX_COMMAND_BYTES }),
        fc.integer({ min: 0, max: 255 }),
        fc.integer({ min: 0, max: 255 }),
        (count, commandLength, answerLength, locality, fill) => {
          const bytes = memoryOf(count);
          const [there, here] = [new FrontendPage(bytes), new RingPage(bytes)];
          assert.equal(there.room, count === 1 ? PAGE_BYTES - 8 : MAX_COMMAND_BYTES);
          const command = commandOf(Math.min(commandLength, there.room), fill);
          there.submit(command, locality);
          assert.equal(here.state, STATE.SUBMIT);
          assert.equal(here.claim, undefined);
          assert.deepEqual(here.take(out), { locality, length: command.length });
          assert.deepEqual(out.subarray(0, command.length), command);
          here.claimAfter(5);
          assert.equal(here.claim, 5);
          const answer = commandOf(Math.min(answerLength, here.room, MAX_COMMAND_BYTES), ~fill & 0xff);
          here.putResponse(answer);
          assert.equal(there.state, THEIR_STATE.SUBMIT, 'until it is whole');
          here.finish(answer.length);
          assert.equal(there.state, THEIR_STATE.FINISH);
          assert.deepEqual(there.answer(), answer);
        },
      ),
    );
  });

  it('lies as the tpmif header says, for a frontend that somebody else wrote', () => {
    const bytes = memoryOf(2);
    bytes.set(getRandom(), 8 + 4);
    bytes.writeUInt32LE(getRandom().length, 0);
    bytes.writeUInt32LE(1, 8);
    bytes.set([STATE.SUBMIT, 0, 0, 1], 4);
    const page = new RingPage(bytes);
    assert.equal(page.take(out).length, getRandom().length);
    page.putResponse(errorResponse(0x101));
    page.finish(10);
    assert.equal(bytes.subarray(0, 22).toString('hex'), '0a00000002000001010000008001' + '0000000a00000101');
  });

  it('says whether a request was taken, and after what, to another backend', () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 0, max: Number.MAX_SAFE_INTEGER - 1000 }),
        fc.integer({ min: 1, max: 1000 }),
        (sequence, later) => {
          const bytes = memoryOf(2);
          new FrontendPage(bytes).submit(getRandom(), 0);
          new RingPage(bytes).claimAfter(sequence);
          const { claim } = new RingPage(bytes);
          assert.ok(claim !== undefined);
          assert.equal(isAfterClaim(sequence, claim), false);
          assert.equal(isAfterClaim(Math.max(0, sequence - later), claim), false);
          assert.equal(isAfterClaim(sequence + later, claim), true);
          assert.deepEqual(
            new RingPage(bytes).take(out),
            { locality: 0, length: undefined },
            'a mark is no length',
          );
          assert.deepEqual(new RingPage(bytes).take(out, true), { locality: 0, length: getRandom().length });
        },
      ),
    );
  });

  it('I-10: of a hostile frontend gives a request inside of it or none, and takes an answer inside of it', () => {
    const header = fc.record({
      length: fc.oneof(fc.integer({ min: 0, max: 0xffffffff }), fc.integer({ min: 0, max: 4200 })),
      state: fc.integer({ min: 0, max: 255 }),
      extra: fc.oneof(fc.integer({ min: 0, max: 255 }), fc.integer({ min: 0, max: 4 })),
    });
    fc.assert(
      fc.property(
        pages,
        header,
        header,
        fc.uint8Array({ minLength: 40, maxLength: 40 }),
        fc.boolean(),
        (count, before, after, packet, isClaimed) => {
          // What is around it belongs to somebody else.
          const around = Buffer.from(new ArrayBuffer((count + 2) * PAGE_BYTES)).fill(0xa5);
          const bytes = around.subarray(PAGE_BYTES, (count + 1) * PAGE_BYTES);
          const put = ({ length, state, extra }: typeof before): void => {
            bytes.writeUInt32LE(length, 0);
            bytes.set([state, 0, 0, extra], 4);
          };
          bytes.fill(0x5a);
          bytes.set(packet, 8);
          for (let index = 0; index < 3 && packet[0]! > 40; index++)
            bytes.writeUInt32LE(index + 1, 8 + 4 * index);
          put(before);
          out.fill(0);
          const page = new RingPage(bytes);
          const { length } = page.take(out, isClaimed);
          if (length !== undefined) {
            assert.ok(length >= 10 && length <= MAX_COMMAND_BYTES);
            assert.ok(before.extra < count);
            assert.ok(out.subarray(0, length).indexOf(Buffer.alloc(8, 0xa5)) < 0, 'nothing from around it');
          }
          // The frontend goes on changing it.
          put(after);
          assert.ok(page.room >= 10 && page.room <= bytes.length);
          page.putResponse(Buffer.alloc(page.room, 1));
          page.finish(page.room);
          page.idle();
          for (const side of [around.subarray(0, PAGE_BYTES), around.subarray(-PAGE_BYTES)]) {
            assert.ok(
              side.every((byte) => byte === 0xa5),
              'nothing outside of it changed',
            );
          }
        },
      ),
      { numRuns: 300 },
    );
  });

  it('takes a cancellation only while there is no answer', () => {
    const bytes = memoryOf(2);
    const [there, here] = [new FrontendPage(bytes), new RingPage(bytes)];
    there.submit(getRandom(), 0);
    here.take(out);
    here.putResponse(errorResponse(0));
    here.finish(10);
    assert.equal(there.cancel(), false);
    assert.equal(there.state, THEIR_STATE.FINISH);
    there.submit(getRandom(), 0);
    assert.equal(there.cancel(), true);
    assert.equal(here.state, STATE.CANCEL);
    here.idle();
    assert.equal(there.state, THEIR_STATE.IDLE);
  });

  it('I-10: gives the frontend no answer of a backend that lies', () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 0, max: 0xffffffff }),
        fc.integer({ min: 0, max: 0xffffffff }),
        (length, size) => {
          const bytes = memoryOf(2);
          const there = new FrontendPage(bytes);
          there.submit(getRandom(), 0);
          bytes.writeUInt32LE(length, 0);
          bytes.writeUInt32BE(size, 12 + 2);
          if (length === size && length >= 10 && length <= MAX_COMMAND_BYTES) return;
          assert.throws(() => there.answer(), /ring|size/);
        },
      ),
    );
  });
});
