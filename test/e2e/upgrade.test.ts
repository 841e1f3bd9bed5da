import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { NV_Increment, openSession, permanent, Rh, readNvIndex, withSession } from 'tpm2-ts-bindings';
import { connectGuest } from 'vtpm-quickstart/guest';
import { Installation, run } from '../support/installation.js';

const UPGRADES = 5;
const COUNTER = 0x01500010;

describe('an upgrade of the supervisor under guests that work without a pause', function () {
  this.timeout(240_000);
  let installation: Installation;
  beforeEach(async () => {
    installation = await Installation.create();
    await installation.start();
  });
  afterEach(() => installation?.destroy());

  const view = async () => (await installation.supervisord('GET', '/vtpms/web1')).body;

  it('loses no command, closes no connection and changes no TPM', async () => {
    const door = await installation.vtpm('web1');
    const before = await view();
    const supervisor = installation.supervisor?.pid;
    let isOver = false;

    // One guest counts in a session that is never renewed, and that a command which is lost or done twice would end.
    const counting = async () => {
      const guest = await connectGuest(door);
      await guest.defineCounter();
      const session = await openSession(guest.tpm, { kind: 'hmac' });
      const first = await guest.counter();
      let steps = 0n;
      while (!isOver) {
        const index = await readNvIndex(guest.tpm, COUNTER);
        assert.ok(index);
        const authHandle = withSession(permanent(Rh.OWNER), session);
        await guest.tpm.run(NV_Increment, { authHandle, nvIndex: index }, {});
        steps++;
        assert.equal(await guest.counter(), first + steps);
      }
      await session.close();
      await guest.close();
      return steps;
    };

    // Another one extends a PCR, whose value knows of every step and its order.
    const extending = async () => {
      const guest = await connectGuest(door);
      let expected: Buffer = Buffer.alloc(32);
      let steps = 0;
      while (!isOver) {
        const text = `step ${steps++}`;
        await guest.extend(16, text);
        expected = sha256(expected, sha256(Buffer.from(text)));
        assert.equal(await guest.pcr(16), expected.toString('hex'));
      }
      await guest.close();
      return steps;
    };

    // The third comes anew for every command, as tpm2-tools do.
    const coming = async () => {
      const tcti = `swtpm:path=${installation.door('web1', 'tcti')}`;
      let runs = 0;
      for (; !isOver; runs++) {
        const { code, stderr } = await run('tpm2_getrandom', ['--hex', '8'], { TPM2TOOLS_TCTI: tcti });
        assert.equal(code, 0, stderr);
      }
      return runs;
    };

    const load = [counting(), extending(), coming()];
    const failure = Promise.race(load.map((guest) => guest.then(() => new Promise<never>(() => undefined))));
    for (let round = 1; round <= UPGRADES; round++) {
      const done = await Promise.race([installation.ctlJson('supervisor', 'upgrade'), failure]);
      assert.equal(done.vtpms, 1);
      const now = await view();
      assert.deepEqual(
        [now.state, now.worker, now.epoch, now.vmRunId],
        ['running', before.worker, before.epoch, before.vmRunId],
      );
    }
    isOver = true;
    const [counted, extended, came] = await Promise.all(load);
    assert.ok(Number(counted) > UPGRADES && Number(extended) > UPGRADES && Number(came) > 0);

    assert.equal(installation.supervisor?.pid, supervisor);
    assert.equal(installation.supervisor?.exitCode, null);
    const health = (await installation.supervisord('GET', '/health')).body;
    assert.equal(health.upgrades, UPGRADES);
    const { vtpms } = (await installation.ctlJson('list')) as unknown as {
      vtpms: { name: string; state: string }[];
    };
    assert.deepEqual(
      vtpms.map(({ name, state }) => [name, state]),
      [['web1', 'running']],
    );

    const after = await connectGuest(door);
    assert.ok((await after.counter()) >= BigInt(counted ?? 0));
    await after.close();
    const stopped = (await installation.supervisord('POST', '/vtpms/web1/stop')).body;
    assert.deepEqual([stopped.state, stopped.reason], ['stopped', null]);
    await installation.ctlJson('start', 'web1');
    const again = await connectGuest(door);
    assert.ok((await again.counter()) >= BigInt(counted ?? 0));
    await again.close();
  });
});

function sha256(...parts: Buffer[]): Buffer {
  const hash = createHash('sha256');
  for (const part of parts) hash.update(part);
  return hash.digest();
}
