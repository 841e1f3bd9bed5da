import assert from 'node:assert/strict';
import fc from 'fast-check';
import { CommandReader } from 'vtpmd/channels/command-reader';

function commandOf(size: number, fill: number): Buffer {
  const command = Buffer.alloc(size, fill);
  command.writeUInt16BE(0x8001, 0);
  command.writeUInt32BE(size, 2);
  return command;
}

const commands = fc.array(
  fc
    .tuple(fc.integer({ min: 10, max: 4096 }), fc.integer({ min: 0, max: 255 }))
    .map(([n, f]) => commandOf(n, f)),
  { maxLength: 12 },
);

function drain(reader: CommandReader): Buffer[] {
  const out: Buffer[] = [];
  for (let command = reader.next(); command; command = reader.next()) out.push(command);
  return out;
}

describe('vtpmd command reader', () => {
  it('gives the same commands however the stream is cut', () => {
    fc.assert(
      fc.property(commands, fc.array(fc.integer({ min: 1, max: 5000 })), (sent, cuts) => {
        const stream = Buffer.concat(sent);
        const reader = new CommandReader();
        const got: Buffer[] = [];
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
          reader.push(Buffer.concat([...sent, bad, rest]));
          assert.deepEqual(drain(reader), [...sent, bad]);
          assert.equal(reader.isBroken, true);
          reader.push(commandOf(12, 0));
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
          for (const command of drain(reader)) assert.ok(command.length >= 10 && command.length <= 4096);
        }
      }),
    );
  });
});
