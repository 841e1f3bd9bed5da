import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { connect } from 'node:net';
import { connectGuest } from 'vtpm-quickstart/guest';
import { Installation } from '../support/installation.js';
import { GuestLoad, type Tally } from '../support/load.js';
import { TpmClient } from '../support/tpm-client.js';
import { getRandom, pcrRead, responseCode } from '../support/tpm-commands.js';

const COMMAND_SIZE = 0x142;
const BAD_TAG = 0x1e;

describe('I-10 TPM commands that are none, under a whole installation', function () {
  this.timeout(120_000);
  let installation: Installation;
  let load: GuestLoad;
  let tally: Tally;
  let pid: number;

  before(async () => {
    installation = await Installation.create({ tpm: 'embedded' });
    await installation.start();
    await installation.vtpm('web1');
    pid = await installation.workerPid('web1');
    const neighbour = await connectGuest(await installation.vtpm('web2'));
    await neighbour.defineCounter();
    const start = await neighbour.counter();
    await neighbour.close();
    tally = { attempted: start, acknowledged: start, seen: start };
    load = await GuestLoad.begin(installation.door('web2'), tally);
  });
  after(async () => {
    await load?.stop();
    await installation?.destroy();
  });

  let servedBefore = 0n;
  beforeEach(() => {
    servedBefore = tally.acknowledged;
  });
  afterEach(async () => {
    // Positive control and neighbour: the same door takes proper commands, the same worker lives, the other one works.
    const client = open('tpm');
    assert.equal(responseCode(await client.transmit(getRandom())), 0);
    client.close();
    assert.equal(await installation.workerPid('web1'), pid);
    while (tally.acknowledged < servedBefore + 2n) await new Promise((resolve) => setImmediate(resolve));
  });

  const open = (door: 'tpm' | 'tcti'): TpmClient => new TpmClient(connect(installation.door('web1', door)));

  for (const door of ['tpm', 'tcti'] as const) {
    it(`I-10 ${door}: a lying or oversized size field is answered COMMAND_SIZE, and the connection closed`, async () => {
      for (const size of [0, 9, 4097, 0x7fffffff, 0xffffffff]) {
        const client = open(door);
        const lying = getRandom();
        lying.writeUInt32BE(size, 2);
        client.send(Buffer.concat([getRandom(), lying]));
        assert.equal(responseCode(await client.response()), 0, 'what came before it is answered');
        assert.equal(responseCode(await client.response()), COMMAND_SIZE);
        await client.ended;
      }
    });

    it(`I-10 ${door}: 4,096 bytes are taken, whatever they say, 4,097 are not`, async () => {
      const client = open(door);
      const full = Buffer.concat([getRandom(), Buffer.alloc(4096 - 12)]);
      full.writeUInt32BE(4096, 2);
      assert.notEqual(responseCode(await client.transmit(full)), 0);
      assert.equal(responseCode(await client.transmit(getRandom())), 0, 'the connection goes on');
      const over = Buffer.concat([full, Buffer.alloc(1)]);
      over.writeUInt32BE(4097, 2);
      assert.equal(responseCode(await client.transmit(over)), COMMAND_SIZE);
      await client.ended;
    });

    it(`I-10 ${door}: a wrong tag, a code that is none, parameters cut short or too long: TPM errors, and on`, async () => {
      const client = open(door);
      const tagged = getRandom();
      tagged.writeUInt16BE(0x1234, 0);
      assert.equal(responseCode(await client.transmit(tagged)), BAD_TAG);
      assert.equal(responseCode(await client.transmit('80010000000affffffff')), 0x143);
      for (const bytes of [10, 11]) {
        const cut = Buffer.from(getRandom().subarray(0, bytes));
        cut.writeUInt32BE(bytes, 2);
        assert.notEqual(responseCode(await client.transmit(cut)), 0);
      }
      assert.equal(responseCode(await client.transmit(getRandom())), 0);
      client.close();
    });

    it(`I-10 ${door}: random bytes never end the worker`, async () => {
      for (let round = 0; round < 40; round++) {
        const client = open(door);
        const bytes = randomBytes(10 + ((round * 97) % 600));
        // Half of them well framed, so that libtpms gets to read them.
        if (round % 2 === 0) {
          bytes.writeUInt16BE(round % 4 === 0 ? 0x8001 : 0x8002, 0);
          bytes.writeUInt32BE(bytes.length, 2);
          bytes.writeUInt32BE(0x11f + ((round * 7) % 0x79), 6);
          assert.ok((await client.transmit(bytes)).length >= 10);
        } else {
          client.send(bytes);
        }
        client.close();
      }
    });

    it(`I-10 ${door}: a command whose end never comes holds up nobody`, async () => {
      const stalled = open(door);
      stalled.send(getRandom().subarray(0, 11));
      const other = open(door);
      assert.equal(responseCode(await other.transmit(getRandom())), 0);
      stalled.close();
      other.close();
    });
  }

  it('I-10 two clients on one door, their bytes interleaved: each gets the answers to its own', async () => {
    for (const door of ['tpm', 'tcti'] as const) {
      const [left, right] = [open(door), open(door)];
      const [first, second] = [getRandom(7), pcrRead(16)];
      for (let at = 0; at < Math.max(first.length, second.length); at++) {
        if (at < first.length) left.send(first.subarray(at, at + 1));
        if (at < second.length) right.send(second.subarray(at, at + 1));
      }
      assert.equal((await left.response()).readUInt16BE(10), 7);
      assert.ok((await right.response()).length > 60, 'a PCR, not seven random bytes');
      left.close();
      right.close();
    }
  });
});
