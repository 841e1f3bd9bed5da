import assert from 'node:assert/strict';
import fc from 'fast-check';
import { decode, encode, frameMessage, MAX_MESSAGE_BYTES, MessageReader, ProtoError } from 'vtpm-proto';

const bytes = (length: number) => fc.uint8Array({ minLength: length, maxLength: length });
const u64 = fc.bigInt({ min: 0n, max: 0xffffffffffffffffn });

describe('the wire codec', () => {
  it('round-trips tickets over the whole 64-bit range', () => {
    fc.assert(
      fc.property(
        u64,
        u64,
        bytes(16),
        bytes(32),
        fc.constantFrom('MANUFACTURE', 'COLD', 'RESUME'),
        (epoch, expiry, uuid, key, verb) => {
          const ticket = {
            format: 1,
            managerId: key,
            vtpmUuid: uuid,
            vmUuid: uuid,
            vmRunId: uuid,
            workerPublicKey: key,
            imageDigest: key,
            isolation: 'sandbox',
            expectedEpoch: epoch,
            verbs: [verb as 'COLD'],
            bootId: uuid,
            expiresAtMonotonicMs: expiry,
          };
          const back = decode('Ticket', encode('Ticket', ticket));
          assert.equal(back.expectedEpoch, epoch);
          assert.equal(back.expiresAtMonotonicMs, expiry);
          assert.deepEqual(back.verbs, [verb]);
          assert.deepEqual(new Uint8Array(back.workerPublicKey), key);
        },
      ),
    );
  });

  it('tells an absent part of a save from an empty one', () => {
    assert.equal(decode('SaveBody', encode('SaveBody', { libtpmsVersion: '' })).permanent, undefined);
    assert.equal(
      decode('SaveBody', encode('SaveBody', { libtpmsVersion: '', permanent: new Uint8Array() })).permanent
        ?.length,
      0,
    );
  });

  it('answers random bytes with a value or a ProtoError', () => {
    fc.assert(
      fc.property(
        fc.uint8Array({ maxLength: 300 }),
        fc.constantFrom('WorkerFrame', 'LoadRequest', 'StoredRecord', 'Ticket'),
        (input, name) => {
          try {
            decode(name as 'Ticket', input);
          } catch (error) {
            assert.ok(error instanceof ProtoError);
          }
        },
      ),
      { numRuns: 1000 },
    );
  });

  it('refuses an enum value it does not know', () => {
    // WorkerFrame.type = 99
    assert.throws(() => decode('WorkerFrame', Buffer.from([0x08, 99])), {
      name: 'ProtoError',
      code: 'malformed',
    });
  });

  it('refuses to encode a message with a field missing or out of range', () => {
    assert.throws(() => encode('Ack', { generation: 2n ** 64n, digest: new Uint8Array(), committed: 0n }), {
      code: 'malformed',
    });
    assert.throws(() => encode('Ack', { generation: 1n } as never), { code: 'malformed' });
  });
});

describe('gRPC message framing', () => {
  it('gives the same messages however the stream is cut', () => {
    fc.assert(
      fc.property(
        fc.array(fc.uint8Array({ maxLength: 200 }), { maxLength: 8 }),
        fc.array(fc.integer({ min: 1, max: 50 }), { minLength: 1 }),
        (messages, cuts) => {
          const stream = Buffer.concat(messages.map(frameMessage));
          const reader = new MessageReader();
          const seen: Buffer[] = [];
          for (let offset = 0, i = 0; offset < stream.length; i++) {
            const size = cuts[i % cuts.length]!;
            seen.push(
              ...reader.push(stream.subarray(offset, offset + size)).map((message) => Buffer.from(message)),
            );
            offset += size;
          }
          assert.deepEqual(
            seen.map((message) => new Uint8Array(message)),
            messages,
          );
        },
      ),
    );
  });

  it('refuses a compressed and an oversized message before it is buffered', () => {
    assert.throws(() => new MessageReader().push(Buffer.from([1, 0, 0, 0, 0])), { code: 'malformed' });
    const header = Buffer.from([0, 0, 0, 0, 0]);
    header.writeUInt32BE(MAX_MESSAGE_BYTES + 1, 1);
    assert.throws(() => new MessageReader().push(header), { code: 'malformed' });
  });
});
