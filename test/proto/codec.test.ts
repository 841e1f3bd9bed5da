import assert from 'node:assert/strict';
import fc from 'fast-check';
import protobuf from 'protobufjs';
import {
  decode,
  descriptor,
  encode,
  frameMessage,
  MAX_MESSAGE_BYTES,
  MessageReader,
  type Messages,
  ProtoError,
} from 'vtpm-proto';
import { isA } from '../support/is-a.js';

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
            assert.ok(isA(error, ProtoError));
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

describe('the wire codec beside protobufjs', () => {
  const root = protobuf.Root.fromJSON(descriptor as protobuf.INamespace);
  root.resolveAll();
  const all = (root.lookup('vtpm.v1') as protobuf.Namespace).nestedArray.filter(
    (item): item is protobuf.Type => item instanceof protobuf.Type,
  );

  function fieldValue(field: protobuf.Field): fc.Arbitrary<unknown> {
    const resolved = field.resolvedType;
    const one: fc.Arbitrary<unknown> =
      resolved instanceof protobuf.Type
        ? messageOf(resolved)
        : resolved instanceof protobuf.Enum
          ? fc.constantFrom(...Object.keys(resolved.values).filter((name) => resolved.values[name] !== 0))
          : field.type === 'bytes'
            ? fc.uint8Array({ maxLength: 200 })
            : field.type === 'string'
              ? fc.string({ unit: 'grapheme', maxLength: 40 })
              : field.type === 'bool'
                ? fc.boolean()
                : field.type === 'uint64'
                  ? fc.oneof(u64, fc.constantFrom(0n, 2n ** 32n, 2n ** 53n - 1n, 2n ** 53n + 1n, 2n ** 63n))
                  : fc.nat({ max: 0xffffffff });
    return field.repeated ? fc.array(one, { maxLength: 3 }) : one;
  }

  function messageOf(type: protobuf.Type): fc.Arbitrary<Record<string, unknown>> {
    const isOptional = (field: protobuf.Field): boolean =>
      !field.repeated && (field.resolvedType instanceof protobuf.Type || field.partOf !== null);
    return fc.record(Object.fromEntries(type.fieldsArray.map((field) => [field.name, fieldValue(field)])), {
      requiredKeys: type.fieldsArray.filter((field) => !isOptional(field)).map(({ name }) => name),
    });
  }

  /** As protobufjs wants it: 64-bit integers as text. */
  const asText = (value: unknown): unknown =>
    typeof value === 'bigint'
      ? value.toString()
      : Array.isArray(value)
        ? value.map(asText)
        : value !== null && typeof value === 'object' && !(value instanceof Uint8Array)
          ? Object.fromEntries(Object.entries(value).map(([key, item]) => [key, asText(item)]))
          : value;

  for (const type of all) {
    it(`writes ${type.name} as it does and reads it back`, () => {
      fc.assert(
        fc.property(messageOf(type), (value) => {
          const name = type.name as keyof Messages;
          const ours = encode(name, value as unknown as Messages[typeof name]);
          const theirs = type.encode(type.fromObject(asText(value) as object)).finish();
          assert.equal(ours.toString('hex'), Buffer.from(theirs).toString('hex'));
          const back = decode(name, ours);
          assert.deepEqual(encode(name, back), ours);
        }),
        { numRuns: 60 },
      );
    });
  }

  it('skips fields it does not know and refuses another wire type', () => {
    const ack = encode('Ack', { generation: 5n, digest: Buffer.from([1]), committed: 6n });
    // Field 900 of each wire type.
    const unknown = Buffer.concat([
      Buffer.from('a03801', 'hex'),
      Buffer.from('a1380102030405060708', 'hex'),
      Buffer.from('a2380461626364', 'hex'),
      Buffer.from('a53801020304', 'hex'),
    ]);
    assert.deepEqual(decode('Ack', Buffer.concat([unknown, ack, unknown])), decode('Ack', ack));
    // Ack.generation as bytes.
    assert.throws(() => decode('Ack', Buffer.from('0a0101', 'hex')), { code: 'malformed' });
  });

  it('refuses a field that crosses the end of its message', () => {
    // SaveBody.journal of two bytes, in which `request` has five.
    assert.throws(() => decode('SaveBody', Buffer.from('1a0212050102030405', 'hex')), { code: 'malformed' });
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
