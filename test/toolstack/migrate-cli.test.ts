import assert from 'node:assert/strict';
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import fc from 'fast-check';
import { decode, signingKeyFromSeed, verifyMigrateOrder } from 'vtpm-proto';
import { globPattern } from 'vtpm-toolstack/cli/commands/evacuate';
import { ManagerApi } from 'vtpm-toolstack/cli/manager-api';
import { makeOrder } from 'vtpm-toolstack/cli/migration/order';
import { type MigrateProgress, progressBar, progressView } from 'vtpm-toolstack/cli/migration/progress';
import { type Answer, type Call, Desk, managerVtpm, supervisorVtpm, vtpmctl } from './cli-fixture.js';

const ID = (digit: number) => `${String(digit).repeat(8)}-0000-4000-8000-000000000000`;
const MIGRATION = 'ab'.repeat(16);
const HOST = 'cd'.repeat(32);
const MANAGER = 'ef'.repeat(32);
const DESCRIPTION = '{"format":1,"name":"web1"}';
const SEED = Buffer.alloc(32, 1);

function progress(phase: string, extra: object = {}) {
  const counts = { bytesSent: 0, bytesTotal: 0, downtimeUs: 0, elapsedUs: 1500 };
  return { phase, ...counts, reason: '', message: '', checks: [], ...extra };
}
const COMMITTED = progress('COMMITTED', {
  bytesSent: 40_960,
  bytesTotal: 40_960,
  downtimeUs: 38_400,
  elapsedUs: 1_234_000,
});
const ABORTED = progress('ABORTED', { reason: 'peer-platform', message: 'PCR 7 is not approved' });
const IN_DOUBT = progress('IN_DOUBT', { reason: 'peer-unreachable', message: 'the network is down' });

/** Everything a migration asks for before it begins, with web1 in this state. */
async function scene(desk: Desk, answer: Answer | ((call: Call) => Answer), extra: object = {}) {
  mkdirSync(desk.paths.toolstack.directory, { recursive: true });
  writeFileSync(desk.paths.toolstack.key, SEED, { mode: 0o600 });
  const web1 = supervisorVtpm(ID(1), 'web1', { state: 'running', description: DESCRIPTION, ...extra });
  await desk.manager({
    'GET /health': { body: { status: 'ready', managerId: MANAGER } },
    'GET /peers': { body: { peers: [{ name: 'hostb', hostId: HOST }] } },
    [`GET /vtpms/${ID(1)}`]: { body: managerVtpm(ID(1)) },
  });
  return await desk.supervisor({
    'GET /vtpms/web1': { body: web1 },
    [`POST /vtpms/${ID(1)}/migrate`]: answer,
  });
}

const saying = (...lines: readonly object[]): Answer => ({
  lines: async (write) => lines.forEach(write),
});

function orderOf(call: Call | undefined) {
  assert.ok(call);
  const { order } = call.body as { order: string };
  return verifyMigrateOrder(decode('SignedMigrateOrder', Buffer.from(order, 'base64')));
}

describe('vtpmctl migrate', () => {
  let desk: Desk;
  beforeEach(() => {
    desk = new Desk();
  });
  afterEach(() => desk.clear());

  it('signs an order for this vTPM, as it is, with the toolstack key', async () => {
    const supervisor = await scene(desk, saying(COMMITTED));
    const { code, stderr } = await desk.ctl(['migrate', 'web1', '--to', 'hostb']);
    assert.equal(code, 0, stderr);
    const order = orderOf(supervisor.calls.find(({ method }) => method === 'POST'));
    const hex = (bytes: Uint8Array) => Buffer.from(bytes).toString('hex');
    assert.equal(hex(order.toolstackKey), hex(signingKeyFromSeed(SEED).publicKey));
    assert.equal(hex(order.managerId), MANAGER);
    assert.equal(hex(order.destination), HOST);
    assert.equal(hex(order.vtpmUuid), ID(1).replaceAll('-', ''));
    assert.equal(order.expectedEpoch, 3n);
    assert.equal(order.leastGeneration, 7n);
    assert.equal(order.mode, 'LIVE');
    assert.equal(order.dryRun, false);
    assert.equal(Buffer.from(order.description).toString(), DESCRIPTION);
    assert.notEqual(hex(order.migrationId), '00'.repeat(16));
  });

  describe('an order', () => {
    const key = signingKeyFromSeed(SEED);
    const peer = { name: 'hostb', hostId: HOST };
    const make = async (extra: object, mode?: 'LIVE' | 'OFFLINE') => {
      await scene(desk, {});
      const vtpm = supervisorVtpm(ID(1), 'web1', { description: DESCRIPTION, ...extra }) as never;
      const options = { isDryRun: false, mode, timeoutSeconds: undefined };
      const manager = new ManagerApi(desk.paths.manager.adminSocket);
      const { bytes } = await makeOrder(key, vtpm, peer, options, { manager });
      return verifyMigrateOrder(decode('SignedMigrateOrder', bytes)).mode;
    };

    for (const [what, extra, wanted, mode] of [
      ['a stopped one', { state: 'stopped' }, undefined, 'OFFLINE'],
      ['one that runs', { state: 'running' }, undefined, 'LIVE'],
      ['one with a VMM', { state: 'running', vmm: { connected: true } }, undefined, 'VMM'],
      ['one with a VMM and --live', { state: 'running', vmm: { connected: true } }, 'LIVE', 'LIVE'],
    ] as const) {
      it(`for ${what} is of mode ${mode}`, async () => {
        assert.equal(await make(extra, wanted), mode);
      });
    }

    for (const [state, wanted, said] of [
      ['running', 'OFFLINE', /vtpmctl stop web1/],
      ['stopped', 'LIVE', /vtpmctl start web1/],
      ['crashed', undefined, /crashed.*vtpmctl stop web1/],
      ['moved', undefined, /it lives on another host: use it there, or migrate it back from there/],
      ['migrating', undefined, /on its way to another host; .*vtpmctl migrate status web1/],
      ['arriving', undefined, /comes from another host .*vtpmctl migrate status web1/],
    ] as const) {
      it(`is not made for one that is ${state}${wanted ? ` where it is to be ${wanted}` : ''}`, async () => {
        await assert.rejects(make({ state }, wanted), said);
      });
    }
  });

  it('says of one that was never started that there is nothing to move', async () => {
    await scene(desk, {}, { state: 'stopped' });
    const manager = new ManagerApi(desk.paths.manager.adminSocket);
    const vtpm = supervisorVtpm(ID(2), 'new', { state: 'stopped', description: DESCRIPTION }) as never;
    const options = { isDryRun: true, mode: undefined, timeoutSeconds: undefined };
    const order = makeOrder(signingKeyFromSeed(SEED), vtpm, { hostId: HOST }, options, { manager });
    await assert.rejects(order, /new was never started.*vtpmctl start new/);
  });

  it('prints a line for each phase, and the time, the downtime and the bytes last', async () => {
    await scene(
      desk,
      saying(
        progress('CONNECTING'),
        progress('CONNECTING'),
        progress('FROZEN', { downtimeUs: 900 }),
        progress('SENDING', { bytesSent: 1024, bytesTotal: 40_960, downtimeUs: 12_000 }),
        COMMITTED,
      ),
    );
    const { code, stdout, stderr } = await desk.ctl(['migrate', 'web1', '--to', 'hostb']);
    assert.equal(code, 0);
    assert.deepEqual(stderr.trim().split('\n'), [
      'web1: connecting',
      'web1: frozen, stopped for 1 ms',
      'web1: sending, 1.0 KiB of 40.0 KiB, stopped for 12 ms',
    ]);
    assert.equal(stdout, 'web1 lives on hostb now: in 1.23 s, stopped for 38 ms, 40.0 KiB\n');
  });

  it('prints JSON lines with --json, the result last', async () => {
    await scene(desk, saying(progress('CONNECTING'), COMMITTED));
    const { stdout } = await desk.ctl(['--json', 'migrate', 'web1', '--to', 'hostb']);
    const lines = stdout
      .trim()
      .split('\n')
      .map((line) => JSON.parse(line) as Record<string, unknown>);
    assert.deepEqual(
      lines.map(({ phase, result }) => phase ?? result),
      ['CONNECTING', 'COMMITTED', 'migrated'],
    );
    const { downtimeUs, elapsedUs, bytes, vtpm } = lines[2]!;
    assert.deepEqual(
      { downtimeUs, elapsedUs, bytes, vtpm },
      { downtimeUs: 38_400, elapsedUs: 1_234_000, bytes: 40_960, vtpm: ID(1) },
    );
  });

  it('lists the checks of a dry run', async () => {
    const checks = [
      { name: 'platform', detail: 'approved 2026-11-01' },
      { name: 'libtpms', detail: '0.9.2 here, 0.9.2 there' },
    ];
    const supervisor = await scene(desk, saying(progress('PREPARED', { checks })));
    const { code, stdout } = await desk.ctl(['migrate', 'web1', '--to', 'hostb', '--dry-run']);
    assert.equal(code, 0);
    assert.match(stdout, /^platform {2}approved 2026-11-01\nlibtpms {3}0\.9\.2 here, 0\.9\.2 there\n/);
    assert.match(stdout, /web1 can go to hostb: .*nothing was stopped\n$/);
    assert.equal(orderOf(supervisor.calls.find(({ method }) => method === 'POST')).dryRun, true);
  });

  it('ends with 1 and the reason where it stays, and where it is in doubt', async () => {
    await scene(desk, saying(ABORTED));
    const stayed = await desk.ctl(['migrate', 'web1', '--to', 'hostb']);
    assert.equal(stayed.code, 1);
    assert.equal(stayed.stdout, 'web1 stays here: PCR 7 is not approved (peer-platform)\n');
    await desk.clear();
    desk = new Desk();
    await scene(desk, saying(IN_DOUBT));
    const doubt = await desk.ctl(['migrate', 'web1', '--to', 'hostb']);
    assert.equal(doubt.code, 1);
    assert.match(doubt.stdout, /in doubt: .*\(peer-unreachable\)\. .*vtpmctl migrate resolve web1\n$/);
  });

  it('does not claim an end that was not said', async () => {
    await scene(desk, {
      lines: async (write) => {
        write(progress('SENDING'));
        throw new Error('the supervisor ends here');
      },
    });
    const { code, stderr, stdout } = await desk.ctl(['migrate', 'web1', '--to', 'hostb']);
    assert.equal(code, 1);
    assert.equal(stdout, '');
    assert.match(stderr, /what came of web1 is not known here .*vtpmctl migrate status web1/);
  });

  it('says which peer there is not, and what the supervisor refuses', async () => {
    const refusal = { code: 'manager-refused', message: 'vTPM 1 is migrating already (migrating)' };
    await scene(desk, { status: 502, body: { error: refusal } });
    const nobody = await desk.ctl(['migrate', 'web1', '--to', 'hostc']);
    assert.equal(nobody.code, 1);
    assert.match(nobody.stderr, /no peer is called hostc; vtpmctl peer list/);
    const refused = await desk.ctl(['migrate', 'web1', '--to', 'hostb']);
    assert.equal(refused.code, 1);
    assert.match(refused.stderr, /is migrating already/);
  });

  describe('interrupted', () => {
    /** Starts vtpmctl; `said` resolves with what it has printed when that matches. */
    function begin(...args: string[]) {
      const child = spawn(process.execPath, [vtpmctl, '--home', desk.paths.home, ...args]);
      let text = '';
      let heard = (): void => undefined;
      for (const stream of [child.stdout, child.stderr]) {
        stream.setEncoding('utf8').on('data', (chunk: string) => {
          text += chunk;
          heard();
        });
      }
      const said = (pattern: RegExp) =>
        new Promise<void>((resolve) => {
          heard = () => {
            if (pattern.test(text)) resolve();
          };
          heard();
        });
      return { child, said, text: () => text };
    }

    const ended = async (child: ChildProcess) => ((await once(child, 'close')) as [number | null])[0];

    /** The supervisor says the first of these, and the second when it is asked to cancel. */
    async function untilCancelled(first: object, second: object, cancelled: boolean): Promise<void> {
      let ask = (): void => undefined;
      const asked = new Promise<void>((resolve) => {
        ask = resolve;
      });
      const supervisor = await scene(desk, {
        lines: async (write) => {
          write(first);
          await asked;
          write(second);
        },
      });
      supervisor.replies[`DELETE /vtpms/${ID(1)}/migrate`] = () => {
        ask();
        return { body: { cancelled } };
      };
    }

    it('cancels before the state is on its way', async () => {
      const aborted = { reason: 'migration-aborted', message: 'it was cancelled' };
      await untilCancelled(progress('PREPARING'), progress('ABORTED', aborted), true);
      const { child, said, text } = begin('migrate', 'web1', '--to', 'hostb');
      await said(/makes itself ready/);
      child.kill('SIGINT');
      assert.equal(await ended(child), 1);
      assert.match(text(), /cancelling: web1 stays here/);
      assert.match(text(), /web1 stays here: it was cancelled/);
    });

    it('says so where it is too late, and waits for the end', async () => {
      await untilCancelled(progress('DECIDING'), COMMITTED, false);
      const { child, said, text } = begin('migrate', 'web1', '--to', 'hostb');
      await said(/the destination decides/);
      child.kill('SIGINT');
      assert.equal(await ended(child), 0, text());
      assert.match(text(), /too late to cancel: the state of web1 is on its way/);
      assert.match(text(), /web1 lives on hostb now/);
    });

    it('leaves the second time, and says that it goes on', async () => {
      const supervisor = await scene(desk, {
        lines: async (write) => {
          write(progress('DECIDING'));
          await new Promise(() => undefined);
        },
      });
      supervisor.replies[`DELETE /vtpms/${ID(1)}/migrate`] = { body: { cancelled: false } };
      const { child, said, text } = begin('migrate', 'web1', '--to', 'hostb');
      await said(/the destination decides/);
      child.kill('SIGINT');
      await said(/interrupt once more/);
      child.kill('SIGINT');
      assert.equal(await ended(child), 1);
      assert.match(text(), /what came of web1 is not known here .*vtpmctl migrate status web1/);
    });
  });
});

describe('vtpmctl migrate status, resolve and cancel', () => {
  let desk: Desk;
  beforeEach(() => {
    desk = new Desk();
  });
  afterEach(() => desk.clear());

  const DOUBT = {
    migration: MIGRATION,
    id: ID(1),
    role: 'source',
    mode: 'LIVE',
    peer: 'hostb',
    state: 'in-doubt',
    begunAt: '2026-11-22T01:00:00.000Z',
    since: '2026-11-22T01:00:02.000Z',
    reason: null,
    message: null,
  };

  it('show what each means, and end with 1 where one is in doubt', async () => {
    const arrived = {
      ...DOUBT,
      ...{ id: ID(2), role: 'destination', state: 'committed', mode: null, begunAt: null, since: null },
      description: '{"name":"../web2"}',
    };
    const refused = {
      ...DOUBT,
      ...{ id: ID(3), role: 'destination', state: 'aborted', description: '{"name":"web3"}' },
      ...{ begunAt: '2026-11-22T02:20:40.123Z', since: '2026-11-22T02:20:41.000Z' },
    };
    const left = { ...arrived, migration: 'ba'.repeat(16), role: 'source', mode: 'LIVE' };
    await desk.manager({ 'GET /migrations': { body: { migrations: [left, arrived, DOUBT, refused] } } });
    await desk.supervisor({ 'GET /vtpms': { body: { vtpms: [supervisorVtpm(ID(1), 'web1')] } } });
    const { code, stdout } = await desk.ctl(['migrate', 'status']);
    assert.equal(code, 1);
    const [head, went, ...rows] = stdout.trimEnd().split('\n');
    assert.match(head!, /^NAME +HOST +MODE +STATE +BEGUN +SINCE$/);
    // Where it was before says nothing of where it is.
    assert.match(went!, /to hostb .*committed .*it went to hostb$/);
    assert.match(rows[0]!, new RegExp(`^${ID(2)} +from hostb +- +committed +- +- +it lives here$`));
    assert.match(rows[1]!, /^web1 +to hostb +live +in-doubt +\S+Z +\S+Z +nobody runs it until hostb says/);
    assert.match(
      rows[2]!,
      /^web3 +from hostb +live +aborted +2026-11-22T02:20:40Z +2026-11-22T02:20:41Z +it stayed on hostb$/,
    );
    const json = (await desk.ctl(['--json', 'migrate', 'status', 'web3'])).stdout;
    const { migrations } = JSON.parse(json) as { migrations: Record<string, unknown>[] };
    assert.deepEqual(
      migrations.map(({ id, name, begunAt, since, peer }) => ({ id, name, begunAt, since, peer })),
      [{ id: ID(3), name: 'web3', begunAt: refused.begunAt, since: refused.since, peer: 'hostb' }],
    );
    const other = await desk.ctl(['migrate', 'status', 'web9']);
    assert.equal(other.code, 0);
    assert.match(other.stdout, /no migration of web9 is under way or in doubt/);
  });

  it('asks the decider, and says what its silence means', async () => {
    const manager = await desk.manager({
      'GET /migrations': { body: { migrations: [DOUBT] } },
      [`POST /migrations/${MIGRATION}/resolve`]: {
        status: 409,
        body: { error: { code: 'in-doubt', message: 'hostb does not answer' } },
      },
    });
    await desk.supervisor({ 'GET /vtpms': { body: { vtpms: [supervisorVtpm(ID(1), 'web1')] } } });
    const silent = await desk.ctl(['migrate', 'resolve', 'web1']);
    assert.equal(silent.code, 1);
    assert.match(silent.stdout, /in-doubt; nobody runs it until hostb says.*\nwhy: hostb does not answer\n/);
    manager.replies[`POST /migrations/${MIGRATION}/resolve`] = {
      body: { verdict: 'COMMIT', takenBack: false },
    };
    const known = await desk.ctl(['migrate', 'resolve', 'web1']);
    assert.equal(known.code, 0);
    assert.equal(known.stdout, 'web1: committed; it lives on hostb\n');
    manager.replies[`POST /migrations/${MIGRATION}/resolve`] = {
      body: { verdict: 'ABORT', takenBack: true },
    };
    const statement = join(desk.directory, 'web1.fencing');
    writeFileSync(statement, 'vtpm-fencing-1-AAAA\n');
    const taken = await desk.ctl(['migrate', 'resolve', 'web1', '--fenced', statement]);
    assert.match(taken.stdout, /^web1: aborted; taken back without the word of the other host/);
    assert.deepEqual(manager.calls.at(-1)?.body, { fencing: 'vtpm-fencing-1-AAAA' });
    const nothing = await desk.ctl(['migrate', 'resolve', 'web2']);
    assert.match(nothing.stderr, /no migration of web2 is in doubt/);
  });

  it('cancel says whether it was in time', async () => {
    const supervisor = await desk.supervisor({
      'GET /vtpms/web1': { body: supervisorVtpm(ID(1), 'web1') },
      [`DELETE /vtpms/${ID(1)}/migrate`]: { body: { cancelled: true } },
    });
    const inTime = await desk.ctl(['migrate', 'cancel', 'web1']);
    assert.deepEqual([inTime.code, inTime.stdout], [0, 'cancelled: web1 stays here\n']);
    supervisor.replies[`DELETE /vtpms/${ID(1)}/migrate`] = { body: { cancelled: false } };
    const late = await desk.ctl(['migrate', 'cancel', 'web1']);
    assert.equal(late.code, 1);
    assert.match(late.stdout, /too late/);
  });
});

describe('vtpmctl evacuate', () => {
  let desk: Desk;
  beforeEach(() => {
    desk = new Desk();
  });
  afterEach(() => desk.clear());

  const NAMES = ['web1', 'web2', 'web3', 'db1', 'gone'] as const;

  /** @param extra of each vTPM */
  async function host(answers: Partial<Record<(typeof NAMES)[number], Answer>>, extra: object = {}) {
    mkdirSync(desk.paths.toolstack.directory, { recursive: true });
    writeFileSync(desk.paths.toolstack.key, SEED, { mode: 0o600 });
    const vtpms = NAMES.map((name, index) =>
      supervisorVtpm(ID(index + 1), name, {
        description: DESCRIPTION,
        state: name === 'gone' ? 'moved' : index % 2 ? 'stopped' : 'running',
        ...extra,
      }),
    );
    await desk.manager({
      'GET /health': { body: { status: 'ready', managerId: MANAGER } },
      'GET /peers': { body: { peers: [{ name: 'hostb', hostId: HOST }] } },
      ...Object.fromEntries(
        NAMES.map((_, index) => [`GET /vtpms/${ID(index + 1)}`, { body: managerVtpm(ID(index + 1)) }]),
      ),
    });
    return await desk.supervisor({
      'GET /vtpms': { body: { vtpms } },
      ...Object.fromEntries(vtpms.map((vtpm) => [`GET /vtpms/${vtpm.id}`, { body: vtpm }])),
      ...Object.fromEntries(
        NAMES.map((name, index) => [
          `POST /vtpms/${ID(index + 1)}/migrate`,
          answers[name] ?? saying(COMMITTED),
        ]),
      ),
    });
  }

  it('moves all that are here, side by side', async () => {
    const waiting: (() => void)[] = [];
    const slow: Answer = {
      lines: async (write) => {
        // Ends only when all four are under way.
        await new Promise<void>((resolve) => {
          waiting.push(resolve);
          if (waiting.length === 4) for (const go of waiting) go();
        });
        write(COMMITTED);
      },
    };
    await host({ web1: slow, web2: slow, web3: slow, db1: slow });
    const { code, stdout, stderr } = await desk.ctl(['evacuate', '--to', 'hostb']);
    assert.equal(code, 0, stderr);
    const lines = stdout.trim().split('\n');
    assert.equal(lines.filter((line) => line.includes(' migrated ')).length, 4);
    assert.ok(!stdout.includes('gone'));
    assert.match(stdout, /done +4 of 4 to hostb\ntime +.*\nlongest stop +38 ms\nbytes +160\.0 KiB\n$/);
  });

  it('says which VMs are to be migrated now', async () => {
    await host({ web1: saying(progress('PREPARED'), COMMITTED) }, { vmm: { connected: true } });
    const { code, stderr } = await desk.ctl(['evacuate', '--to', 'hostb', '--only', 'web?']);
    assert.equal(code, 0, stderr);
    assert.equal(stderr.trim(), 'web1 waits for its VM: migrate that now, to hostb');
  });

  it('goes on over failures, names them by reason, and ends with 1', async () => {
    await host({
      web1: saying(ABORTED),
      web3: saying(ABORTED),
      db1: { status: 502, body: { error: { code: 'busy', message: 'db1 is just stopping' } } },
    });
    const { code, stdout } = await desk.ctl(['--json', 'evacuate', '--to', 'hostb']);
    assert.equal(code, 1);
    const lines = stdout
      .trim()
      .split('\n')
      .map((line) => JSON.parse(line) as Record<string, unknown>);
    const { summary } = lines.at(-1) as { summary: Record<string, unknown> };
    assert.equal(summary.done, 1);
    const failures = summary.failures as Record<string, string[]>;
    assert.deepEqual(failures['peer-platform']?.sort(), ['web1', 'web3']);
    assert.deepEqual(failures.busy, ['db1']);
  });

  it('takes those alone whose names fit', async () => {
    const ready = saying(progress('PREPARED'));
    const supervisor = await host({ web1: ready, web2: ready, web3: ready });
    const only = ['evacuate', '--to', 'hostb', '--dry-run', '--only'];
    const none = await desk.ctl([...only, 'wbe*', 'x*']);
    assert.equal(none.code, 1);
    assert.match(none.stderr, /no vTPM here is called wbe\* or x\*; there are: web1, web2, web3, db1\n$/);
    const gone = await desk.ctl([...only, 'gone']);
    assert.equal(gone.code, 0, gone.stderr);
    assert.deepEqual(supervisor.calls.filter(({ method }) => method === 'POST').length, 0);
    const { code, stdout, stderr } = await desk.ctl([...only, 'web?', 'x*']);
    assert.equal(code, 0, stderr);
    assert.equal(stderr, 'no vTPM here is called x*\n');
    assert.match(stdout, /^checked +3 of 3 can go to hostb; nothing was stopped$/m);
    assert.doesNotMatch(stdout, /done/);
    const orders = supervisor.calls.filter(({ method }) => method === 'POST');
    assert.deepEqual(
      orders.map(({ path }) => path).sort(),
      [1, 2, 3].map((n) => `/vtpms/${ID(n)}/migrate`),
    );
    assert.ok(orders.every((call) => orderOf(call).dryRun));
  });

  it('interrupted, begins no other and cancels those under way', async () => {
    let cancelled = (): void => undefined;
    const until = new Promise<void>((resolve) => {
      cancelled = resolve;
    });
    const supervisor = await host({
      web1: {
        lines: async (write) => {
          write(progress('PREPARING'));
          await until;
          write(progress('ABORTED', { reason: 'migration-aborted', message: 'it was cancelled' }));
        },
      },
    });
    supervisor.replies[`DELETE /vtpms/${ID(1)}/migrate`] = () => {
      cancelled();
      return { body: { cancelled: true } };
    };
    const begun = new Promise<void>((resolve) => {
      const reply = supervisor.replies[`POST /vtpms/${ID(1)}/migrate`] as Answer;
      supervisor.replies[`POST /vtpms/${ID(1)}/migrate`] = () => {
        resolve();
        return reply;
      };
    });
    const child = spawn(
      process.execPath,
      [vtpmctl, '--home', desk.paths.home, 'evacuate', '--to', 'hostb', '--parallel', '1'],
      { stdio: ['ignore', 'pipe', 'ignore'] },
    );
    let text = '';
    child.stdout.setEncoding('utf8').on('data', (chunk: string) => {
      text += chunk;
    });
    await begun;
    child.kill('SIGINT');
    const [code] = (await once(child, 'close')) as [number | null];
    assert.equal(code, 1);
    assert.match(text, /1\/4 not-migrated web1: it was cancelled/);
    assert.match(text, /not begun +web2, web3, db1/);
    assert.equal(supervisor.calls.filter(({ method }) => method === 'POST').length, 1);
  });

  it('a glob stands for what it says, and for nothing else', () => {
    for (const [glob, fits, not] of [
      ['web*', ['web', 'web1', 'web.x'], ['aweb', 'we']],
      ['db?', ['db1'], ['db', 'db12']],
      ['a.b', ['a.b'], ['axb']],
    ] as const) {
      for (const name of fits) assert.match(name, globPattern(glob));
      for (const name of not) assert.doesNotMatch(name, globPattern(glob));
    }
    fc.assert(fc.property(fc.stringMatching(/^[a-z0-9._-]{1,20}$/), (name) => globPattern(name).test(name)));
  });
});

describe('what has moved', () => {
  it('is listed with where it lives, is forgotten by delete, and nothing else of it is touched', async () => {
    const desk = new Desk();
    try {
      const erasure = { isDone: true, retiredAt: '2026-11-22T02:20:41.000Z', due: null };
      const moved = managerVtpm(ID(1), { kind: 'moved', movedTo: 'hostb', erasure });
      const manager = await desk.manager({
        'GET /health': { body: { status: 'ready' } },
        'GET /vtpms?limit=200': {
          body: { vtpms: [moved], next: null },
        },
        [`GET /vtpms/${ID(1)}`]: { body: moved },
      });
      const went = { movedTo: 'hostb', movedAt: '2026-11-22T02:20:40.000Z' };
      const web1 = supervisorVtpm(ID(1), 'web1', { state: 'moved', ...went });
      const supervisor = await desk.supervisor({
        'GET /vtpms': { body: { vtpms: [web1] } },
        'GET /vtpms/web1': { body: web1 },
        [`DELETE /vtpms/${ID(1)}`]: { body: { id: ID(1) } },
      });
      assert.match(
        (await desk.ctl(['list'])).stdout,
        /web1 .* moved .*it lives on hostb; vtpmctl delete web1/,
      );
      const shown = (await desk.ctl(['show', 'web1'])).stdout;
      assert.match(shown, /state +moved\nnote +it lives on hostb.*\nsince +2026-11-22T02:20:40Z/);
      assert.doesNotMatch(shown, /\.sock|retired/);
      for (const command of [
        ['exec', 'web1', '--', 'true'],
        ['qemu-args', 'web1'],
      ]) {
        const refused = await desk.ctl(command);
        assert.deepEqual([refused.code, refused.stdout], [1, '']);
        assert.match(
          refused.stderr,
          /lives on hostb since 2026-11-22T02:20:40.000Z: use it there, or migrate it back/,
        );
      }
      const deleted = await desk.ctl(['delete', 'web1']);
      assert.equal(deleted.code, 0, deleted.stderr);
      assert.match(deleted.stdout, /forgotten +web1\nstate +untouched: it lives on hostb/);
      assert.ok(supervisor.calls.some(({ method }) => method === 'DELETE'));
      assert.ok(manager.calls.every(({ method }) => method === 'GET'));
    } finally {
      await desk.clear();
    }
  });
});

describe('the progress of a migration', () => {
  const some = (phase: string, extra: object = {}) => progress(phase, extra) as unknown as MigrateProgress;

  it('is one line that changes on a terminal, and fits it', () => {
    let text = '';
    const stderr = {
      isTTY: true as const,
      columns: 64,
      write: (chunk: string | Uint8Array) => {
        text += String(chunk);
        return true;
      },
    };
    const view = progressView('web1', stderr);
    view.show(some('CONNECTING'));
    view.show(some('SENDING', { bytesSent: 20_480, bytesTotal: 40_960, downtimeUs: 12_000 }));
    assert.ok(!text.includes('\n'));
    for (const line of text.split('\r\x1b[K')) assert.ok(line.length < 64, line);
    assert.match(text, /web1 \[#+\.+\] sending, 20\.0 KiB of 40\.0 KiB/);
    view.end();
    assert.ok(text.endsWith('\r\x1b[K'));
  });

  it('never goes back', () => {
    const order = [
      'CONNECTING',
      'ATTESTING',
      'PREPARING',
      'PREPARED',
      'FREEZING',
      'FROZEN',
      'SENDING',
      'DECIDING',
      'COMMITTED',
    ];
    const lengths = order.flatMap((phase) =>
      (phase === 'SENDING' ? [0, 0.5, 1] : [0]).map((share) => {
        const line = progressBar('x', some(phase, { bytesSent: 1000 * share, bytesTotal: 1000 }), 80);
        return line.split('#').length;
      }),
    );
    assert.deepEqual(
      lengths,
      [...lengths].sort((a, b) => a - b),
    );
  });
});
