import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { closeSync, mkdtempSync, openSync, readdirSync, readlinkSync, rmSync, writeSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { openDevice } from 'tpm2-ts-bindings';
import { type DeviceFile, DeviceTransport } from 'tpm2-ts-bindings/internal/transport/device-transport';
import { until } from '../support/until.js';
import { has } from './make.js';

const COMMAND = Buffer.from('80010000000c0000017b0008', 'hex');
const ANSWER = Buffer.from('8001000000140000000000080102030405060708', 'hex');
const errno = (code: string, syscall = 'write'): Error =>
  Object.assign(new Error(`${code}: as the system says`), { code, syscall });

/** A driver that does the next step of its script with each call. */
function scripted(steps: { write?: (Error | number)[]; read?: (Error | Buffer)[] }) {
  const { write = [], read = [ANSWER] } = steps;
  const seen = { writes: 0, reads: 0, closed: 0 };
  const file: DeviceFile = {
    async write(bytes) {
      const step = write[seen.writes++] ?? bytes.length;
      if (step instanceof Error) throw step;
      return step;
    },
    async read(into) {
      const step = read[seen.reads++] ?? Buffer.alloc(0);
      if (step instanceof Error) throw step;
      into.set(step);
      return step.length;
    },
    async close() {
      seen.closed++;
    },
  };
  return { file, seen };
}

/** What a real device adds to this (the kernel's EBUSY, partial reads and errors) needs a chip. */
describe('tpm2-ts-bindings: device transport', () => {
  let directory: string;
  before(() => {
    directory = mkdtempSync(join(tmpdir(), 'vtpm-device-'));
  });
  after(() => rmSync(directory, { recursive: true, force: true }));

  function fifo(name: string): string {
    const path = join(directory, name);
    execFileSync('mkfifo', [path]);
    return path;
  }

  // A FIFO gives back what was written: enough to see one write, the reads and no position.
  it('one write for each command, one command at a time', async () => {
    const transport = await openDevice(fifo('echo'));
    for (let time = 0; time < 3; time++) assert.deepEqual(await transport.transmit(COMMAND), COMMAND);
    const first = transport.transmit(COMMAND);
    await assert.rejects(transport.transmit(COMMAND), /already under way/);
    await first;
    await transport.close();
    await assert.rejects(transport.transmit(COMMAND), has('transport'));
  });

  it('a deadline ends the wait at once, and the descriptor when the thread is back', async () => {
    const path = fifo('slow');
    const transport = await openDevice(path, { deadline: 20 });
    const descriptors = (): string[] =>
      readdirSync('/proc/self/fd').filter((fd) => {
        try {
          return readlinkSync(`/proc/self/fd/${fd}`) === path;
        } catch {
          return false;
        }
      });
    // The first four bytes of an answer: the driver's second read does not come back.
    await assert.rejects(transport.transmit(COMMAND.subarray(0, 4)), /no answer within 20 ms/);
    await transport.close();
    await assert.rejects(transport.transmit(COMMAND), /failed before/);
    assert.equal(descriptors().length, 1, 'the read is under way');
    const late = openSync(path, 'r+');
    writeSync(late, ANSWER);
    await until('the device is closed', () => descriptors().length === 1);
    closeSync(late);
    assert.deepEqual(descriptors(), []);
  });

  it('an answer in any pieces is put together', async () => {
    const cuts = fc.uniqueArray(fc.integer({ min: 1, max: ANSWER.length - 1 }));
    await fc.assert(
      fc.asyncProperty(cuts, async (at) => {
        const ends = [...at.sort((a, b) => a - b), ANSWER.length];
        const read = ends.map((end, index) => ANSWER.subarray(ends[index - 1] ?? 0, end));
        const { file, seen } = scripted({ read });
        assert.deepEqual(await new DeviceTransport('tpm', file).transmit(COMMAND), ANSWER);
        assert.equal(seen.reads, ends.length);
      }),
    );
  });

  it('answers that end early or lie about their size are refused, and the device closed', async () => {
    for (const [read, message] of [
      [[], /ended after 0 of unknown bytes/],
      [[ANSWER.subarray(0, 12)], /ended after 12 of 20 bytes/],
      [[Buffer.concat([ANSWER, Buffer.alloc(1)])], /21 bytes, 20 announced/],
      [[Buffer.from('80010000100100000000', 'hex')], /4097 bytes was announced/],
      [[Buffer.from('80010000000900000000', 'hex')], /9 bytes was announced/],
    ] as const) {
      const { file, seen } = scripted({ read: [...read] });
      const transport = new DeviceTransport('tpm', file);
      await assert.rejects(transport.transmit(COMMAND), message);
      await assert.rejects(transport.transmit(COMMAND), /failed before/);
      await transport.close();
      assert.equal(seen.closed, 1);
    }
  });

  it('a driver that is busy is asked again, and not for ever', async () => {
    const later = scripted({ write: [errno('EBUSY'), errno('EBUSY'), COMMAND.length] });
    assert.deepEqual(await new DeviceTransport('tpm', later.file).transmit(COMMAND), ANSWER);
    assert.equal(later.seen.writes, 3);
    const never = scripted({ write: Array<Error>(1000).fill(errno('EBUSY')) });
    const transport = new DeviceTransport('tpm', never.file, { busyWait: 12 });
    await assert.rejects(transport.transmit(COMMAND), /EBUSY: an earlier command/);
    assert.equal(never.seen.reads, 0, 'the answer of another command is not taken');
  });

  it('closing ends the wait for a busy driver', async () => {
    const { file, seen } = scripted({ write: Array<Error>(1000).fill(errno('EBUSY')) });
    const transport = new DeviceTransport('tpm', file, { busyWait: 3_600_000 });
    const waiting = assert.rejects(transport.transmit(COMMAND), /closed/);
    await transport.close();
    await waiting;
    await until('the file is closed', () => seen.closed === 1);
  });

  it('what the driver fails with is named', async () => {
    for (const code of ['ETIME', 'EPIPE', 'EIO', 'ENOMEM']) {
      for (const steps of [{ write: [errno(code)] }, { read: [errno(code, 'read')] }]) {
        const transport = new DeviceTransport('/dev/tpmrm0', scripted(steps).file);
        await assert.rejects(transport.transmit(COMMAND), (error: unknown) => {
          assert.match(String(error), new RegExp(`/dev/tpmrm0: ${code}: (?!as the system)`));
          return has('transport')(error);
        });
      }
    }
    const short = scripted({ write: [4] });
    await assert.rejects(new DeviceTransport('tpm', short.file).transmit(COMMAND), /4 of 12 bytes written/);
  });

  it('a command that its caller wipes after a deadline is sent as it was, and its answer not read', async () => {
    let release: () => void = () => undefined;
    let taken: Buffer | undefined;
    let into: Uint8Array | undefined;
    let isClosed = false;
    const file: DeviceFile = {
      async write(bytes) {
        await new Promise<void>((resolve) => {
          release = resolve;
        });
        taken = Buffer.from(bytes);
        return bytes.length;
      },
      async read(buffer) {
        into = buffer;
        return 0;
      },
      async close() {
        isClosed = true;
      },
    };
    const transport = new DeviceTransport('tpm', file, { deadline: 1 });
    const command = Buffer.from(COMMAND);
    await assert.rejects(transport.transmit(command), /no answer within 1 ms/);
    command.fill(0);
    assert.ok(!isClosed);
    release();
    await until('the file is closed', () => isClosed);
    assert.deepEqual(taken, COMMAND);
    assert.equal(into, undefined, 'nothing is read for a command that was given up');
  });
});
