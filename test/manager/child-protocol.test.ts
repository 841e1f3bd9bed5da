import assert from 'node:assert/strict';
import fc from 'fast-check';
import {
  decodeEntries,
  decodeKey,
  decodeList,
  decodeWrites,
  encodeEntries,
  encodeFrame,
  encodeKey,
  encodeList,
  encodeWrites,
  type Frame,
  FrameReader,
  MAX_FRAME_BYTES,
  ProtocolError,
} from 'vtpm-manager/store/child-protocol';
import { isA } from '../support/is-a.js';

const bytes = (maxLength: number) => fc.uint8Array({ maxLength }).map((array) => Buffer.from(array));
const key = fc.stringMatching(/^[\x21-\x7e]{1,128}$/);
const version = fc.maxSafeNat();
const plain = { noNullPrototype: true };
const frame = fc.record(
  { code: fc.integer({ min: 0, max: 255 }), id: fc.nat(0xffffffff), body: bytes(300) },
  plain,
);

function readAll(reader: FrameReader, chunks: Iterable<Buffer>): Frame[] {
  return [...chunks].flatMap((chunk) => [...reader.push(chunk)]);
}

/** `bytes` cut at arbitrary places. */
function cut(whole: Buffer, places: readonly number[]): Buffer[] {
  const at = [0, ...places.map((place) => place % (whole.length + 1)).sort((a, b) => a - b), whole.length];
  return at.slice(1).map((end, index) => whole.subarray(at[index], end));
}

describe('frames between manager and store process', () => {
  it('arrive as they were sent, however the stream is cut', () => {
    fc.assert(
      fc.property(
        fc.array(frame, { maxLength: 5 }),
        fc.array(fc.nat(), { maxLength: 20 }),
        (frames, places) => {
          const stream = Buffer.concat(frames.map(({ code, id, body }) => encodeFrame(code, id, [body])));
          assert.deepEqual(readAll(new FrameReader(), cut(stream, places)), frames);
        },
      ),
    );
  });

  it('carry writes, entries, keys and list requests', () => {
    const write = fc.record({ key, expectedVersion: version, value: fc.option(bytes(200)) }, plain);
    const entry = fc.record({ key, version, value: bytes(200) }, plain);
    fc.assert(
      fc.property(fc.array(write), fc.array(entry), key, fc.nat(0xffff), (writes, entries, one, limit) => {
        assert.deepEqual(decodeWrites(Buffer.concat(encodeWrites(writes))), writes);
        assert.deepEqual(decodeEntries(Buffer.concat(encodeEntries(entries))), entries);
        assert.equal(decodeKey(encodeKey(one)), one);
        for (const after of [one, undefined]) {
          assert.deepEqual(decodeList(Buffer.concat(encodeList(after, limit))), { after, limit });
        }
      }),
    );
  });

  it('I-10 any other bytes are refused as such and not misread', () => {
    const decoders = [decodeWrites, decodeEntries, decodeKey, decodeList];
    fc.assert(
      fc.property(fc.array(bytes(60), { maxLength: 5 }), (chunks) => {
        for (const decode of decoders) onlyProtocolErrors(() => decode(Buffer.concat(chunks)));
        onlyProtocolErrors(() => readAll(new FrameReader(), chunks));
      }),
    );
  });

  it('I-10 a body that is cut short is refused', () => {
    const whole = Buffer.concat(
      encodeWrites([{ key: 'a', expectedVersion: 1, value: Buffer.from('value') }]),
    );
    for (let length = 0; length < whole.length; length++) {
      assert.throws(() => decodeWrites(whole.subarray(0, length)), ProtocolError);
    }
    assert.throws(() => decodeWrites(Buffer.concat([whole, Buffer.alloc(1)])), ProtocolError);
  });

  it('are bounded, before any of their memory is taken', () => {
    assert.throws(() => encodeFrame(1, 1, [Buffer.alloc(MAX_FRAME_BYTES)]), ProtocolError);
    const header = Buffer.alloc(4);
    header.writeUInt32BE(MAX_FRAME_BYTES - 3, 0);
    assert.throws(() => readAll(new FrameReader(), [header]), ProtocolError);
    const largest = encodeFrame(1, 1, [Buffer.alloc(MAX_FRAME_BYTES - 9)]);
    assert.equal(readAll(new FrameReader(), [largest])[0]?.body.length, MAX_FRAME_BYTES - 9);
  });
});

function onlyProtocolErrors(action: () => unknown): void {
  try {
    action();
  } catch (error) {
    assert.ok(isA(error, ProtocolError), String(error));
  }
}
