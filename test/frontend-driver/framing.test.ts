import assert from 'node:assert/strict';
import fc from 'fast-check';
import { FrontendError, HEADER_BYTES, MAX_MESSAGE_BYTES, MessageAssembler } from 'vtpm-frontend-driver';
import { isA } from '../support/is-a.js';

const message = fc
  .uint8Array({ minLength: HEADER_BYTES, maxLength: 600 })
  .map((bytes) => withSize(Buffer.from(bytes), bytes.length));

describe('the framing of TPM messages', () => {
  it('gives back whole messages whatever the pieces they arrive in', () => {
    fc.assert(
      fc.property(
        fc.array(message, { maxLength: 6 }),
        fc.array(fc.nat({ max: 700 }), { maxLength: 40 }),
        (messages, cuts) => {
          const stream = Buffer.concat(messages);
          const assembler = new MessageAssembler();
          const received: Buffer[] = [];
          for (const piece of pieces(stream, cuts)) received.push(...assembler.push(piece));
          assert.deepEqual(received, messages);
          assert.equal(assembler.pendingBytes, 0);
        },
      ),
    );
  });

  it('says how much of a message is there when the stream ends within it', () => {
    fc.assert(
      fc.property(message, fc.nat(), (whole, at) => {
        const part = whole.subarray(0, at % whole.length);
        const assembler = new MessageAssembler();
        assert.deepEqual(assembler.push(part), []);
        assert.equal(assembler.pendingBytes, part.length);
      }),
    );
  });

  it('hands out copies: the buffer that was read into may be used again', () => {
    const whole = withSize(Buffer.alloc(12, 7), 12);
    const [received] = new MessageAssembler().push(whole);
    whole.fill(0);
    assert.equal(received?.[11], 7);
  });

  it('refuses sizes that no TPM message has', () => {
    fc.assert(
      fc.property(
        fc.oneof(
          fc.nat({ max: HEADER_BYTES - 1 }),
          fc.integer({ min: MAX_MESSAGE_BYTES + 1, max: 0xffffffff }),
        ),
        (size) => {
          assert.throws(
            () => new MessageAssembler().push(withSize(Buffer.alloc(HEADER_BYTES), size)),
            (error) => isA(error, FrontendError) && error.code === 'protocol',
          );
        },
      ),
    );
    for (const size of [HEADER_BYTES, MAX_MESSAGE_BYTES]) {
      assert.equal(new MessageAssembler().push(withSize(Buffer.alloc(size), size)).length, 1);
    }
  });
});

function withSize(bytes: Buffer, size: number): Buffer {
  bytes.writeUInt32BE(size, 2);
  return bytes;
}

function* pieces(stream: Buffer, cuts: readonly number[]): Generator<Buffer> {
  let offset = 0;
  for (const cut of cuts) {
    yield stream.subarray(offset, offset + cut);
    offset = Math.min(stream.length, offset + cut);
  }
  yield stream.subarray(offset);
}
