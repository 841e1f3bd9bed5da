import assert from 'node:assert/strict';
import { connect } from 'node:net';
import { connectGuest, type Guest } from 'vtpm-quickstart/guest';
import { Installation } from '../support/installation.js';
import { TpmClient } from '../support/tpm-client.js';
import { responseCode } from '../support/tpm-commands.js';
import { until } from '../support/until.js';

/** MiB. The disk has room for the worker's image, the store and some more. */
const RESERVE = { VTPM_STORE_RESERVE: '24' };

describe('I-10 a disk that is full', function () {
  this.timeout(180_000);
  let installation: Installation;
  let guest: Guest;
  let neighbour: Guest;

  before(async () => {
    installation = await Installation.create({ homeDisk: '400m' });
    await installation.startManager({ env: RESERVE });
    await installation.startSupervisor({ env: RESERVE });
    guest = await connectGuest(await installation.vtpm('web1'));
    neighbour = await connectGuest(await installation.vtpm('web2'));
    await guest.defineCounter();
    await neighbour.defineCounter();
    // Registered while there was room, never started.
    await installation.ctlJson('create', 'late');
  });
  afterEach(() => installation?.disk?.clear());
  after(async () => {
    await guest?.close();
    await neighbour?.close();
    await installation?.destroy();
  });

  it('I-10 below the reserve no vTPM is made, by name; those there are save', async () => {
    const before = await guest.counter();
    installation.disk?.fill(12);
    const refused = await installation.ctl('create', 'web3');
    assert.equal(refused.code, 1, refused.stderr);
    assert.match(refused.stderr, /keeps 24 MiB for the vTPMs there are.*make room.*store-reserve/s);
    // The manager decides for itself, whatever the supervisor has let through.
    const start = await installation.supervisord('POST', '/vtpms/late/start');
    assert.notEqual(start.status, 200);
    assert.match(JSON.stringify(start.body), /store-full: no new vTPM is made/);
    for (let step = 0; step < 20; step++) await guest.increment();
    assert.equal(await guest.counter(), before + 20n);
    // One that exists is started again: only a new one is refused.
    await installation.ctlJson('stop', 'web2');
    await neighbour.close();
    await installation.ctlJson('start', 'web2');
    neighbour = await connectGuest(installation.door('web2'));
    await neighbour.increment();

    installation.disk?.clear();
    await installation.ctlJson('create', 'web3');
    await installation.ctlJson('start', 'web3');
    await installation.ctlJson('start', 'late');
  });

  it('I-10 I-8 really full: saves wait as in an outage, nothing is lost, and it goes on by itself', async () => {
    const { disk } = installation;
    const pid = await installation.workerPid('web1');
    const before = await guest.counter();
    const pcr = await neighbour.pcr(16);
    const refusals = (): number => installation.logs().split('nothing was written, make room').length;
    const refusedBefore = refusals();
    disk?.fill(0);
    // A state that grows needs new pages of the store, however many old ones are free.
    const grown = growUntilHeld(installation.door('web1'));
    await until('a save is refused, again and again', () => refusals() > refusedBefore + 1);
    assert.equal((await installation.admin('GET', '/health')).body.status, 'ready');
    assert.equal(await neighbour.pcr(16), pcr, 'the neighbour, which saves nothing, is served');
    assert.equal((await installation.supervisord('GET', '/vtpms/web1')).body.state, 'running');

    disk?.clear();
    const codes = await grown.stop();
    assert.ok(
      codes.length > 0 && codes.every((code) => code === 0),
      `answers ${codes.map(String).join(' ')}`,
    );
    assert.equal(await installation.workerPid('web1'), pid, 'the worker has lived on');
    await guest.increment();
    assert.equal(await guest.counter(), before + 1n);
    await neighbour.increment();
    // What was answered is there after a restart of everything.
    await guest.close();
    await installation.ctlJson('stop', 'web1');
    await installation.ctlJson('start', 'web1');
    guest = await connectGuest(installation.door('web1'));
    assert.equal(await guest.counter(), before + 1n);
    assert.equal(await definedSpaces(installation.door('web1')), codes.length);
  });
});

const FIRST_SPACE = 0x01510000;
const TPM_RC_RETRY = 0x922;

/** A guest that fills its NV memory, asking again where it is told to, until `stop`. */
function growUntilHeld(door: string): { stop(): Promise<number[]> } {
  const client = new TpmClient(connect(door));
  const codes: number[] = [];
  let isStopping = false;
  const run = async (): Promise<void> => {
    for (let at = 0; at < 24 && !(isStopping && at > 0); ) {
      const code = responseCode(await client.transmit(nvDefineAndFill(FIRST_SPACE + at)));
      if (code === TPM_RC_RETRY) continue;
      codes.push(code);
      at++;
    }
  };
  const finished = run();
  return {
    stop: async () => {
      isStopping = true;
      await finished;
      client.close();
      return codes;
    },
  };
}

/** TPM2_NV_DefineSpace of 1,600 bytes: OWNERWRITE | AUTHWRITE | OWNERREAD | AUTHREAD | NO_DA. */
function nvDefineAndFill(index: number): Buffer {
  const body = `40000001 00000009 40000009 0000 00 0000 0000 000e ${index.toString(16).padStart(8, '0')} 000b 02060006 0000 0640`;
  const rest = Buffer.from(body.replaceAll(' ', ''), 'hex');
  const header = Buffer.from('80020000000000000 12a'.replaceAll(' ', ''), 'hex');
  header.writeUInt32BE(10 + rest.length, 2);
  return Buffer.concat([header, rest]);
}

async function definedSpaces(door: string): Promise<number> {
  const client = new TpmClient(connect(door));
  const command = Buffer.from('8001000000160000017a000000010151000000000060', 'hex');
  const answer = await client.transmit(command);
  client.close();
  const count = answer.readUInt32BE(15);
  return Array.from({ length: count }, (_, at) => answer.readUInt32BE(19 + 4 * at)).filter(
    (handle) => handle >= FIRST_SPACE && handle < FIRST_SPACE + 0x100,
  ).length;
}
