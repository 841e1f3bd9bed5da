import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { createConnection } from 'node:net';
import { Installation, run } from '../support/installation.js';
import { MssimClient } from '../support/mssim-client.js';
import { TpmClient } from '../support/tpm-client.js';
import {
  counterOf,
  createPrimaryRsa,
  flushContext,
  getRandom,
  lockoutCounter,
  lockoutCounterOf,
  nvDefineCounter,
  nvIncrement,
  nvReadCounter,
  pcrExtend,
  pcrRead,
  ppCommands,
  responseCode,
} from '../support/tpm-commands.js';
import { until } from '../support/until.js';

const COUNTER = 0x01500003;
const FAILURE = 0x101;
const TPM_RC_CANCELED = 0x909;
const NO_DIGEST = '00'.repeat(32);

/** TpmTcpProtocol.h */
const POWER_ON = 1;
const POWER_OFF = 2;
const PRESENCE_ON = 3;
const PRESENCE_OFF = 4;
const CANCEL_ON = 9;
const CANCEL_OFF = 10;
const NV_ON = 11;
const NV_OFF = 12;
const HANDSHAKE = 15;
const RESET = 17;
const SESSION_END = 20;
const STOP = 21;

describe('the mssim door', () => {
  let installation: Installation;
  let port: number;
  let client: MssimClient;

  before(async () => {
    installation = await Installation.create({ tpm: 'embedded' });
    await installation.start();
    await installation.vtpm('web1', '--doors', 'tpm,mssim');
    port = await portOf();
  });
  after(() => installation?.destroy());
  beforeEach(async () => {
    client = await MssimClient.connect(port);
    assert.equal(await client.signal(POWER_ON), 0);
  });
  afterEach(() => client.close());

  async function portOf(): Promise<number> {
    const { body } = await installation.supervisord('GET', '/vtpms/web1');
    return (body.sockets as { mssim: number }).mssim;
  }
  const raw = () => new TpmClient(createConnection(installation.door('web1')));
  const pcr = async (of: { transmit(command: Buffer): Promise<Buffer> } = client) =>
    (await of.transmit(pcrRead(16))).subarray(-32).toString('hex');

  it('is two ports of the loopback interface and of no other', () => {
    const listening = (at: number): (string | undefined)[] =>
      ['tcp', 'tcp6'].flatMap((table) =>
        readFileSync(`/proc/net/${table}`, 'utf8')
          .split('\n')
          .map((line) => line.trim().split(/\s+/))
          .filter(([, local, , state]) => state === '0A' && local?.endsWith(`:${hexPort(at)}`))
          .map(([, local]) => local),
      );
    for (const at of [port, port + 1]) assert.deepEqual(listening(at), [`0100007F:${hexPort(at)}`]);
  });

  it('powers the TPM on and off; while it is off every command on every door fails', async () => {
    const other = raw();
    assert.equal(responseCode(await client.transmit(pcrExtend(16, Buffer.alloc(32, 1)))), 0);
    const extended = await pcr();
    // On already: nothing happens.
    assert.equal(await client.signal(POWER_ON), 0);
    assert.equal(await pcr(other), extended);
    assert.equal(await client.signal(POWER_OFF), 0);
    assert.equal(await client.signal(POWER_OFF), 0);
    for (const who of [client, other]) {
      const answer = await who.transmit(getRandom());
      assert.deepEqual([responseCode(answer), answer.length], [FAILURE, 10]);
    }
    // A TPM that is off is not reset.
    assert.equal(await client.signal(RESET), 0);
    assert.equal(responseCode(await client.transmit(getRandom())), FAILURE);
    assert.equal(await client.signal(POWER_ON), 0);
    assert.equal(await client.signal(NV_ON), 0);
    assert.equal(await pcr(other), NO_DIGEST);
    assert.equal(responseCode(await client.transmit(getRandom())), 0);
    other.close();
  });

  it('resets it, and what is permanent stays', async () => {
    assert.equal(responseCode(await client.transmit(nvDefineCounter(COUNTER))), 0);
    for (let resets = 1; resets <= 4; resets++) {
      assert.equal(responseCode(await client.transmit(nvIncrement(COUNTER))), 0);
      await client.transmit(pcrExtend(16, Buffer.alloc(32, 1)));
      assert.equal(await client.signal(RESET), 0);
      assert.equal(await pcr(), NO_DIGEST);
      assert.equal(counterOf(await client.transmit(nvReadCounter(COUNTER))), BigInt(resets));
    }
    // Each was shut down before: none is counted as a wrong authorisation.
    assert.equal(lockoutCounterOf(await client.transmit(lockoutCounter())), 0);
  });

  it('says who is present', async () => {
    // TPM_RC_PP for the first session (part 2, section 6.6.3): PP_Commands is the one command that wants it always.
    const TPM_RC_PP = 0x990;
    assert.equal(responseCode(await client.transmit(ppCommands())), TPM_RC_PP);
    assert.equal(await client.signal(PRESENCE_ON), 0);
    assert.equal(responseCode(await client.transmit(ppCommands())), 0);
    assert.equal(await client.signal(PRESENCE_OFF), 0);
    assert.equal(responseCode(await client.transmit(ppCommands())), TPM_RC_PP);
  });

  it('has locality 0 and no other, and no dynamic root of trust', async () => {
    const before = await pcr();
    for (const locality of [1, 2, 3, 4, 5, 255]) {
      const answer = await client.transmit(pcrExtend(16, Buffer.alloc(32, 1)), locality);
      assert.equal(responseCode(answer), 0x907);
    }
    assert.equal(await client.request(5), 1);
    assert.equal(await client.request(6, '00000003616263'), 1);
    assert.equal(await client.request(7), 1);
    assert.equal(await pcr(), before);
  });

  it('shakes hands, and refuses what it does not do', async () => {
    client.commands.send('0000000f00000001');
    assert.equal((await client.commands.bytes(12)).toString('hex'), '000000010000000d00000000');
    assert.equal(await client.signal(NV_OFF), 1);
    assert.equal(await client.signal(CANCEL_ON), 0);
    assert.equal(await client.signal(CANCEL_OFF), 0);
    assert.equal(responseCode(await client.transmit(getRandom())), 0);
    assert.equal(await client.request(HANDSHAKE, '00000000'), 1);
    await client.commands.ended;
  });

  it('ends a connection that says so, or whose requests nobody knows', async () => {
    for (const [code, answer] of [
      [SESSION_END, ''],
      [99, '00000001'],
      [0x80010000, '00000001'],
    ] as const) {
      const one = await MssimClient.connect(port);
      for (const end of [one.commands, one.platform]) {
        end.send(code.toString(16).padStart(8, '0'));
        await end.ended;
        assert.equal(end.received.toString('hex'), answer);
      }
      one.close();
    }
    assert.equal(responseCode(await client.transmit(getRandom())), 0, 'other connections go on');
  });

  it('powers the TPM off where the simulator is told to stop', async () => {
    for (const side of ['commands', 'platform'] as const) {
      const one = await MssimClient.connect(port);
      assert.equal(await one.signal(POWER_ON), 0);
      one[side].send(STOP.toString(16).padStart(8, '0'));
      await one[side].ended;
      assert.equal(responseCode(await client.transmit(getRandom())), FAILURE);
      one.close();
    }
  });

  it('cancels a command of its own, and no other', async () => {
    const other = raw();
    /** The code of a key generation that the platform cancels from its beginning to its end. */
    const cancelled = async (who: { transmit(command: Buffer): Promise<Buffer> }, salt: number) => {
      let isDone = false;
      const made = who.transmit(createPrimaryRsa(3072, Buffer.alloc(32, salt))).finally(() => {
        isDone = true;
      });
      while (!isDone) assert.equal(await client.signal(CANCEL_ON), 0);
      const answer = await made;
      const code = responseCode(answer);
      assert.ok(code === 0 || code === TPM_RC_CANCELED, code.toString(16));
      if (code === 0) await who.transmit(flushContext(answer.readUInt32BE(10)));
      return code;
    };
    // libtpms looks between two candidates for a prime: keys whose first ones are prime are made all the same.
    const seen = new Set<number>();
    for (let salt = 0; salt < 20 && !seen.has(TPM_RC_CANCELED); salt++) {
      seen.add(await cancelled(client, salt));
      assert.equal(await cancelled(other, salt), 0);
    }
    assert.ok(seen.has(TPM_RC_CANCELED));
    assert.equal(responseCode(await other.transmit(getRandom())), 0);
    other.close();
  });

  it('closes with its worker, and the TPM goes on', async () => {
    await client.transmit(pcrExtend(16, Buffer.alloc(32, 1)));
    const extended = await pcr();
    process.kill(await installation.workerPid('web1'), 'SIGKILL');
    await Promise.all([client.commands.ended, client.platform.ended]);
    client = await MssimClient.connect(port);
    assert.equal(await pcr(), extended);
    assert.equal(await client.signal(POWER_ON), 0);
    assert.equal(await pcr(), extended, 'it was on');
  });

  it('stays where it is with the next program of the supervisor', async () => {
    const extended = await pcr();
    const { status } = await installation.supervisord('POST', '/upgrade');
    assert.equal(status, 200);
    assert.equal(await portOf(), port);
    assert.equal(await pcr(), extended, 'and so does who is connected');
    const late = await MssimClient.connect(port);
    assert.equal(await pcr(late), extended);
    late.close();
  });

  it('lets no other user in', async function () {
    if (process.getuid?.() !== 0) this.skip();
    const ask = `const s = require('node:net').connect(${port}, '127.0.0.1');
      s.on('error', () => {});
      s.on('close', () => console.log('closed'));
      s.on('data', (data) => { console.log(data.toString('hex')); s.destroy(); });
      s.write(Buffer.from('0000000f00000001', 'hex'));`;
    const asUser = async (...prefix: string[]) => {
      const [program = '', ...args] = [...prefix, process.execPath, '-e', ask];
      return (await run(program, args)).stdout.split('\n')[0];
    };
    const asOther = ['setpriv', '--reuid', '54321', '--clear-groups'];
    assert.equal(await asUser(), '000000010000000d00000000');
    assert.equal(await asUser(...asOther), 'closed');
    // Who is gone when the supervisor looks is nobody.
    const powerOff = `const s = require('node:net').connect(${port + 1}, '127.0.0.1');
      s.end(Buffer.from('00000002', 'hex'), () => process.exit());`;
    installation.supervisor?.kill('SIGSTOP');
    try {
      const [program = '', ...args] = [...asOther, process.execPath, '-e', powerOff];
      assert.equal((await run(program, args)).code, 0);
    } finally {
      installation.supervisor?.kill('SIGCONT');
    }
    const later = await MssimClient.connect(port);
    assert.equal(await later.signal(CANCEL_OFF), 0);
    assert.equal(responseCode(await later.transmit(getRandom())), 0, 'the TPM is on');
    later.close();
  });

  it('lets no other user in who has gone before anybody looks', async function () {
    if (process.getuid?.() !== 0) this.skip();
    const supervisor = installation.supervisor?.pid ?? 0;
    const extended = await pcr();
    // Connected by the kernel, left behind with what is to be done, and closed.
    const ask = `const request = Buffer.from('0000000${POWER_OFF}', 'hex');
      for (let left = 16; left > 0; left--) {
        const socket = require('node:net').connect(${port + 1}, '127.0.0.1', () => {
          socket.write(request);
          socket.destroy();
        });
      }`;
    process.kill(supervisor, 'SIGSTOP');
    try {
      const args = ['--reuid', '54321', '--clear-groups', process.execPath, '-e', ask];
      assert.equal((await run('setpriv', args)).code, 0);
      // Until their end is acknowledged they are their user's still.
      const FIN_WAIT2 = '05';
      await until(
        'all are closed',
        () => statesTowards(port + 1).filter((state) => state === FIN_WAIT2).length >= 16,
      );
    } finally {
      process.kill(supervisor, 'SIGCONT');
    }
    // Whoever comes later is let in later.
    const late = await MssimClient.connect(port);
    assert.equal(await late.signal(PRESENCE_OFF), 0);
    assert.equal(await pcr(late), extended);
    late.close();
  });

  it('is not there for a vTPM without it', async () => {
    await installation.vtpm('web2');
    const { body } = await installation.supervisord('GET', '/vtpms/web2');
    assert.equal((body.sockets as { mssim: null }).mssim, null);
    const refused = await installation.ctl('create', 'web3', '--doors', 'mssim,control');
    assert.equal(refused.code, 1);
    assert.match(refused.stderr, /cannot have the door "mssim"/);
    await until('it is closed', async () => {
      await installation.ctlJson('stop', 'web1');
      return (await installation.supervisord('GET', '/vtpms/web1')).body.state === 'stopped';
    });
    await assert.rejects(MssimClient.connect(port), { code: 'ECONNREFUSED' });
  });
});

/** Of the clients' ends. */
function statesTowards(port: number): string[] {
  return readFileSync('/proc/net/tcp', 'utf8')
    .split('\n')
    .map((line) => line.trim().split(/\s+/))
    .flatMap(([, , remote, state]) => (remote === `0100007F:${hexPort(port)}` && state ? [state] : []));
}

function hexPort(port: number): string {
  return port.toString(16).toUpperCase().padStart(4, '0');
}
