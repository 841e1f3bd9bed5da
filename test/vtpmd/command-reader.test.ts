import assert from 'node:assert/strict';
import fc from 'fast-check';
import { CommandReader } from 'vtpmd/channels/command-reader';
import { frame } from '../support/framed.js';

function commandOf(size: number, fill: number): Buffer {
  const command = Buffer.alloc(size, fill);
  command.writeUInt16BE(0x8001, 0);
  command.writeUInt32BE(size, 2);
  return command;
}

/** Bare where it has no locality. */
interface Sent {
  readonly command: Buffer;
  readonly locality: number | undefined;
}
const commands: fc.Arbitrary<Sent[]> = fc.array(
  fc.record(
    {
      command: fc
        .tuple(fc.integer({ min: 10, max: 4096 }), fc.integer({ min: 0, max: 255 }))
        .map(([n, f]) => commandOf(n, f)),
      locality: fc.option(fc.integer({ min: 0, max: 255 }), { nil: undefined }),
    },
    { noNullPrototype: true },
  ),
  { maxLength: 12 },
);
const inStream = ({ command, locality }: Sent): Buffer =>
  locality === undefined ? command : frame(command, locality);

function drain(reader: CommandReader): Sent[] {
  const out: Sent[] = [];
  for (let message = reader.next(); message; message = reader.next()) {
    const { command, frame: found } = message;
    if (found) assert.deepEqual(found.around(command), frame(command, found.locality));
    out.push({ command, locality: found?.locality });
  }
  return out;
}

describe('vtpmd command reader', () => {
  it('gives the same commands however the stream is cut', () => {
    fc.assert(
      fc.property(commands, fc.array(fc.integer({ min: 1, max: 5000 })), (sent, cuts) => {
        const stream = Buffer.concat(sent.map(inStream));
        const reader = new CommandReader();
        const got: Sent[] = [];
        let offset = 0;
        for (const cut of [...cuts, stream.length]) {
          // One memory for all reads, as on a connection: what was pushed must have been copied.
          const chunk = Buffer.from(stream.subarray(offset, offset + cut));
          offset += cut;
          reader.push(chunk);
          chunk.fill(0xee);
          got.push(...drain(reader));
        }
        assert.deepEqual(got, sent);
        assert.equal(reader.pendingBytes, 0);
        assert.equal(reader.isBroken, false);
      }),
    );
  });

  it('ends the framing at a size that no command can have', () => {
    fc.assert(
      fc.property(
        commands,
        fc.oneof(fc.integer({ min: 0, max: 9 }), fc.integer({ min: 4097, max: 0xffffffff })),
        fc.uint8Array({ maxLength: 200 }),
        (sent, size, rest) => {
          const bad = commandOf(10, 0);
          bad.writeUInt32BE(size, 2);
          const reader = new CommandReader();
          reader.push(Buffer.concat([...sent.map(inStream), bad, rest]));
          assert.deepEqual(drain(reader), [...sent, { command: bad, locality: undefined }]);
          assert.equal(reader.isBroken, true);
          reader.push(commandOf(12, 0));
          assert.equal(reader.next(), undefined);
        },
      ),
    );
  });

  it('ends it at a frame of such a length too, and refuses what is in it', () => {
    fc.assert(
      fc.property(
        commands,
        fc.oneof(fc.integer({ min: 0, max: 9 }), fc.integer({ min: 4097, max: 0xffffffff })),
        (sent, size) => {
          const bad = frame(Buffer.alloc(0), 0, size);
          const reader = new CommandReader();
          reader.push(Buffer.concat([...sent.map(inStream), bad, commandOf(12, 0)]));
          for (let left = sent.length; left > 0; left--) assert.equal(reader.next()?.isBroken, false);
          const message = reader.next();
          assert.equal(message?.frame?.refusal({ current: 0, allows: () => true }), 0x142);
          assert.deepEqual(message.frame.around(message.command), bad);
          assert.equal(reader.isBroken, true);
          assert.equal(reader.next(), undefined);
        },
      ),
    );
  });

  it('takes any bytes without an exception', () => {
    fc.assert(
      fc.property(fc.array(fc.uint8Array({ maxLength: 300 })), (chunks) => {
        const reader = new CommandReader();
        for (const chunk of chunks) {
          reader.push(chunk);
          for (const { command } of drain(reader)) assert.ok(command.length >= 10 && command.length <= 4096);
        }
      }),
    );
  });
});
