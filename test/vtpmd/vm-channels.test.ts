import assert from 'node:assert/strict';
import { once } from 'node:events';
import { Socket } from 'node:net';
import { type Duplex, duplexPair } from 'node:stream';
import { buffer } from 'node:stream/consumers';
import fc from 'fast-check';
import { socketPair } from 'vtpm-common/libc';
import type { VtpmdError } from 'vtpmd/error';
import { Channels, WINDOW_BYTES } from 'vtpmd/vm/channels';
import { encodeFrame, encodeNumber, type Frame, FrameReader, MAX_PAYLOAD_BYTES } from 'vtpmd/vm/frames';
import { until } from '../support/until.js';

const frame = fc.oneof(
  fc.record({
    channel: fc.nat(0xffffffff),
    type: fc.constant('data' as const),
    payload: fc.uint8Array({ minLength: 1, maxLength: 2000 }).map((bytes) => Buffer.from(bytes)),
  }),
  fc.record({
    channel: fc.nat(0xffffffff),
    type: fc.constantFrom('credit' as const, 'exit' as const),
    payload: fc.uint8Array({ minLength: 4, maxLength: 4 }).map((bytes) => Buffer.from(bytes)),
  }),
  fc.record({
    channel: fc.nat(0xffffffff),
    type: fc.constantFrom('open' as const, 'end' as const, 'close' as const),
    payload: fc.constant(Buffer.alloc(0)),
  }),
);

const encoded = ({ channel, type, payload }: Frame): Buffer => encodeFrame(channel, type, payload);

describe('frames between a VM and its host', () => {
  it('come out as they went in, however the stream is cut', () => {
    fc.assert(
      fc.property(
        fc.array(frame, { maxLength: 12 }),
        fc.array(fc.integer({ min: 1, max: 3000 })),
        (sent, cuts) => {
          const stream = Buffer.concat(sent.map(encoded));
          const reader = new FrameReader();
          const got: Frame[] = [];
          let offset = 0;
          for (const cut of [...cuts, stream.length]) {
            got.push(...reader.push(stream.subarray(offset, offset + cut)));
            offset += cut;
          }
          assert.deepEqual(
            got,
            sent.map((one) => ({ ...one })),
          );
        },
      ),
    );
  });

  it('are refused by name where no frame is like that', () => {
    const bad = [
      '00000000 06 000000',
      '00000000 ff 000000',
      '00000001 01 000000',
      '00000001 01 004001',
      '00000001 01 ffffff',
      '00000001 00 000001',
      '00000001 04 000000',
      '00000001 04 000005',
      '00000000 05 000003',
    ];
    for (const header of bad) {
      const reader = new FrameReader();
      assert.throws(
        () => reader.push(Buffer.from(header.replaceAll(' ', ''), 'hex')),
        { code: 'protocol' },
        header,
      );
    }
  });
});

interface Side {
  readonly channels: Channels;
  readonly opened: Duplex[];
  readonly exits: number[];
  readonly failed: Promise<VtpmdError>;
}

function side(transport: Duplex, mayBeOpened: boolean): Side {
  const opened: Duplex[] = [];
  const exits: number[] = [];
  let fail: (error: VtpmdError) => void;
  const failed = new Promise<VtpmdError>((resolve) => {
    fail = resolve;
  });
  const channels = new Channels(transport, {
    ...(mayBeOpened && { opened: (channel: Duplex) => void opened.push(channel) }),
    exited: (status) => void exits.push(status),
    failed: (error) => fail(error),
  });
  return { channels, opened, exits, failed };
}

function pair(transports: readonly [Duplex, Duplex] = duplexPair()): { host: Side; vm: Side } {
  return { host: side(transports[0], false), vm: side(transports[1], true) };
}

/** The peer is this test, frame by frame. */
function against(mayBeOpened: boolean): { side: Side; peer: Duplex; frames: () => Frame[] } {
  const [ours, peer] = duplexPair();
  const reader = new FrameReader();
  const frames: Frame[] = [];
  peer.on('data', (chunk: Buffer) => frames.push(...reader.push(chunk)));
  return { side: side(ours, mayBeOpened), peer, frames: () => frames };
}

const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve));

describe('channels between a VM and its host', () => {
  it('carry every byte in order, both ways, whatever is sent on the others', async () => {
    const contents = fc.array(fc.uint8Array({ maxLength: 40_000 }), { minLength: 1, maxLength: 6 });
    await fc.assert(
      fc.asyncProperty(
        fc.array(fc.tuple(contents, contents), { minLength: 1, maxLength: 8 }),
        async (all) => {
          const { host, vm } = pair();
          const near = all.map(() => host.channels.open());
          await turn();
          assert.equal(vm.opened.length, all.length);
          await Promise.all(
            all.map(async ([there, back], index) => {
              const [ours, theirs] = [near[index]!, vm.opened[index]!];
              for (const part of there) ours.write(part);
              for (const part of back) theirs.write(part);
              ours.end();
              theirs.end();
              const [gotBack, gotThere] = await Promise.all([buffer(ours), buffer(theirs)]);
              assert.ok(gotThere.equals(Buffer.concat(there)));
              assert.ok(gotBack.equals(Buffer.concat(back)));
            }),
          );
        },
      ),
      { numRuns: 30 },
    );
  });

  it('hold up nobody else where one is not read, and keep no more of it than its window', async () => {
    const { host, vm } = pair();
    const stuck = host.channels.open();
    const other = host.channels.open();
    await turn();
    for (let i = 0; i < 100; i++) stuck.write(Buffer.alloc(MAX_PAYLOAD_BYTES));
    const size = 5 * WINDOW_BYTES;
    other.end(Buffer.alloc(size, 7));
    assert.equal((await buffer(vm.opened[1]!)).length, size);
    assert.equal(vm.opened[0]!.readableLength, WINDOW_BYTES);
    stuck.end();
    assert.equal((await buffer(vm.opened[0]!)).length, 100 * MAX_PAYLOAD_BYTES);
  });

  it('give what was sent before the sender closed, and close the other end', async () => {
    const { host, vm } = pair();
    const near = host.channels.open();
    await turn();
    const far = vm.opened[0]!;
    far.end(Buffer.alloc(WINDOW_BYTES, 1), () => far.destroy());
    const closed = once(near, 'close');
    await turn();
    assert.equal((await buffer(near)).length, WINDOW_BYTES);
    await closed;
    const second = host.channels.open();
    await turn();
    second.destroy();
    await once(vm.opened[1]!, 'close');
  });

  it('say the status that the VM ends with, after all that it said before', async () => {
    const { host, vm } = pair();
    vm.channels.control.write('stopped\n');
    vm.channels.exit(3);
    const [said] = (await once(host.channels.control, 'data')) as [Buffer];
    assert.equal(said.toString(), 'stopped\n');
    assert.deepEqual(host.exits, [3]);
  });

  it('all close when the port does', async () => {
    const [hostEnd, vmEnd] = socketPair().map((fd) => new Socket({ fd })) as [Socket, Socket];
    const { host, vm } = pair([hostEnd, vmEnd]);
    const near = host.channels.open();
    const far = await until('the channel is open', () => vm.opened[0]);
    const closed = Promise.all([once(near, 'close'), once(far, 'close')]);
    vmEnd.destroy();
    assert.equal((await host.failed).code, 'link-lost');
    await closed;
  });

  const data = (channel: number, bytes: number): Buffer => encodeFrame(channel, 'data', Buffer.alloc(bytes));
  const overWindow = Array.from({ length: WINDOW_BYTES / MAX_PAYLOAD_BYTES + 1 }, () =>
    data(0, MAX_PAYLOAD_BYTES),
  );
  const hostile: readonly [string, boolean, Buffer][] = [
    ['opens a channel to the host', false, encodeFrame(1, 'open')],
    ['opens a channel out of turn', true, encodeFrame(2, 'open')],
    ['opens a channel twice', true, Buffer.concat([encodeFrame(1, 'open'), encodeFrame(1, 'open')])],
    ['speaks on a channel that never was', false, data(7, 1)],
    ['sends more than the window', false, Buffer.concat(overWindow)],
    ['gives credit that was not used', false, encodeNumber(0, 'credit', 1)],
    ['sends after the end', false, Buffer.concat([encodeFrame(0, 'end'), data(0, 1)])],
    ['sends no frames', false, Buffer.alloc(64, 0xff)],
  ];
  for (const [what, mayBeOpened, bytes] of hostile) {
    it(`fail by name where the peer ${what}`, async () => {
      const { side: attacked, peer } = against(mayBeOpened);
      const closed = once(attacked.channels.control, 'close');
      peer.write(bytes);
      assert.equal((await attacked.failed).code, 'protocol');
      await closed;
    });
  }

  it('open no more than a worker can have', async () => {
    const { side: attacked, peer } = against(true);
    for (let id = 1; id <= 300; id++) peer.write(encodeFrame(id, 'open'));
    assert.equal((await attacked.failed).code, 'protocol');
    assert.ok(attacked.opened.length < 260, `${attacked.opened.length}`);
  });

  it('survive any bytes of the peer with nothing but that error', async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.array(fc.oneof(frame.map(encoded), fc.uint8Array({ maxLength: 40 })), { maxLength: 20 }),
        async (parts) => {
          const { side: attacked, peer } = against(true);
          for (const part of parts) peer.write(part);
          peer.end();
          assert.match((await attacked.failed).code, /^(protocol|link-lost)$/);
        },
      ),
    );
  });
});
