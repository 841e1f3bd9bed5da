import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { chmodSync, mkdirSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { decode, signingKeyFromSeed, signTicket, uuidToBytes, verifyTicketChain } from 'vtpm-proto';
import { Desk, managerVtpm, supervisorVtpm, vtpmctl } from './cli-fixture.js';

const ID = (digit: number) => `${String(digit).repeat(8)}-0000-4000-8000-000000000000`;

describe('vtpmctl', () => {
  let desk: Desk;
  beforeEach(() => {
    desk = new Desk();
  });
  afterEach(() => desk.clear());

  describe('usage and exit statuses', () => {
    it('prints its version and that of libtpms', async () => {
      const { code, stdout } = await desk.ctl(['--version']);
      assert.equal(code, 0);
      assert.match(stdout, /^vtpmctl \d+\.\d+\.\d+\nlibtpms \d+\.\d+\.\d+\n$/);
    });

    it('shows examples in the help of every command, and the exit statuses', async () => {
      const { stdout } = await desk.ctl(['--help']);
      assert.match(stdout, /Exit status:\n {2}0 {2}done\n/);
      for (const command of [
        'init',
        'up',
        'down',
        'doctor',
        'uninstall',
        'create',
        'start',
        'stop',
        'delete',
        'list',
        'show',
        'exec',
        'logs',
        'image allow',
        'audit tail',
        'audit verify',
        'audit export',
        'config show',
        'migrate',
        'migrate resolve',
        'evacuate',
      ]) {
        const help = await desk.ctl([...command.split(' '), '--help']);
        assert.equal(help.code, 0);
        assert.match(help.stdout, /Examples:\n {2}vtpmctl|Examples:\n {2}VTPM/, command);
      }
    });

    for (const args of [
      ['frobnicate'],
      ['create'],
      ['create', 'Web1'],
      ['create', '../web1'],
      ['create', ID(1)],
      ['create', 'web1', '--vm-uuid', 'x'],
      ['create', 'web1', '--isolation', 'jail'],
      ['create', 'web1', '--colour', 'red'],
      ['init'],
      ['init', '--tpm', 'magic'],
      ['image', 'allow', 'abc'],
      ['exec', 'web1'],
      ['logs', '--lines', 'many'],
      ['migrate', 'web1'],
      ['evacuate'],
      ['--log-level', 'loud', 'list'],
    ]) {
      it(`ends with 2 on wrong usage: ${args.join(' ')}`, async () => {
        const { code, stderr, stdout } = await desk.ctl(args);
        assert.equal(code, 2, stderr);
        assert.notEqual(stderr, '');
        assert.equal(stdout, '');
        const json = await desk.ctl(['--json', ...args]);
        assert.equal(json.code, 2);
        assert.equal((JSON.parse(json.stderr) as { error: { code: string } }).error.code, 'usage');
      });
    }

    it('ends with 2 on a configuration file with an unknown key, and names it', async () => {
      mkdirSync(desk.paths.home, { recursive: true });
      writeFileSync(desk.paths.config, JSON.stringify({ 'log-levle': 'debug' }));
      const { code, stderr } = await desk.ctl(['list']);
      assert.equal(code, 2);
      assert.match(stderr, /log-levle/);
    });

    it('ends with 3 and the next step when a daemon is not running', async () => {
      for (const args of [
        ['list'],
        ['start', 'web1'],
        ['show', 'web1'],
        ['exec', 'web1', '--', 'true'],
        ['image', 'list'],
        ['delete', 'web1', '--yes'],
      ]) {
        const { code, stderr } = await desk.ctl(args);
        assert.equal(code, 3, args.join(' '));
        assert.match(stderr, /is not running; start it: vtpmctl up/);
      }
    });

    it('ends with 4 when the manager is locked, and says why', async () => {
      const locked = {
        status: 503,
        body: { error: { code: 'locked', message: 'PCR 7 is not as enrolled' } },
      };
      await desk.manager({ 'GET /images': locked });
      const { code, stderr } = await desk.ctl(['--json', 'image', 'list']);
      assert.equal(code, 4);
      const { error } = JSON.parse(stderr) as { error: { code: string; message: string } };
      assert.equal(error.code, 'locked');
      assert.match(error.message, /PCR 7 is not as enrolled; .*vtpmctl up/);
    });

    it("ends with 1 on a daemon's refusal and keeps its reason", async () => {
      const body = { error: { code: 'worker-failed', message: 'the worker ended: stale-epoch' } };
      await desk.supervisor({ 'POST /vtpms/web1/start': { status: 502, body } });
      const { code, stderr } = await desk.ctl(['start', 'web1']);
      assert.equal(code, 1);
      assert.match(stderr, /stale-epoch.*vtpmctl logs web1/);
    });

    it('takes flags before and after the command, and shows where a setting comes from', async () => {
      const shown = await desk.ctl(['config', 'show', '--json', '--log-level', 'debug'], {
        VTPM_ISOLATION: 'none',
      });
      const { settings } = JSON.parse(shown.stdout) as {
        settings: Record<string, { value: unknown; source: string }>;
      };
      assert.deepEqual(
        [
          settings.home?.source,
          settings['log-level']?.source,
          settings.isolation?.source,
          settings['ticket-lifetime']?.source,
        ],
        ['flag', 'flag', 'environment', 'default'],
      );
    });

    it('starts nothing and makes nothing without an installation', async () => {
      const { code, stderr } = await desk.ctl(['up']);
      assert.equal(code, 1);
      assert.match(stderr, /not initialised; run: vtpmctl init/);
      assert.equal((await desk.ctl(['down'])).code, 0);
      assert.throws(() => statSync(desk.paths.home));
    });
  });

  describe('create', () => {
    const seed = Buffer.alloc(32, 5);
    const delegate = signingKeyFromSeed(randomBytes(32));
    const answers = {
      'GET /health': { body: { status: 'ready', delegateKey: delegate.publicKey.toString('hex') } },
      'POST /vtpms': ({ body }: { body: unknown }) => ({
        status: 201,
        body: supervisorVtpm(String((body as { id: string }).id), 'web1'),
      }),
    };
    const withKey = () => {
      mkdirSync(desk.paths.toolstack.directory, { recursive: true, mode: 0o700 });
      writeFileSync(desk.paths.toolstack.key, seed, { mode: 0o600 });
    };

    it("delegates one vTPM to the supervisor's key, without import and export", async () => {
      withKey();
      const supervisor = await desk.supervisor(answers);
      const { code, stderr } = await desk.ctl(['create', 'web1', '--autostart', '--vm-uuid', ID(7)]);
      assert.equal(code, 0, stderr);
      const sent = supervisor.calls.at(-1)?.body as Record<string, string>;
      assert.deepEqual(
        { ...sent, id: 0, delegation: 0, delegationSignature: 0 },
        {
          id: 0,
          name: 'web1',
          vmUuid: ID(7),
          isolation: 'sandbox',
          autostart: true,
          startup: 'clear',
          socketOwner: null,
          socketMode: '0600',
          delegation: 0,
          delegationSignature: 0,
        },
      );
      // A ticket of the delegate under this delegation stands up to the manager's own check.
      const ticket = signTicket(
        delegate,
        {
          format: 1,
          managerId: Buffer.alloc(32),
          vtpmUuid: uuidToBytes(sent.id!),
          vmUuid: uuidToBytes(ID(7)),
          vmRunId: Buffer.alloc(16),
          workerPublicKey: Buffer.alloc(32),
          imageDigest: Buffer.alloc(32),
          isolation: 'sandbox',
          expectedEpoch: 0n,
          verbs: ['MANUFACTURE'],
          bootId: Buffer.alloc(16),
          expiresAtMonotonicMs: 1n,
        },
        {
          delegation: Buffer.from(sent.delegation!, 'base64'),
          signature: Buffer.from(sent.delegationSignature!, 'base64'),
        },
      );
      const { delegation } = verifyTicketChain(ticket);
      assert.deepEqual(delegation.verbs, ['MANUFACTURE', 'COLD', 'RESUME']);
      assert.deepEqual(Buffer.from(delegation.toolstackKey), signingKeyFromSeed(seed).publicKey);
    });

    it('delegates import and export too where its state blobs are to be plain, and says so loudly', async () => {
      withKey();
      const supervisor = await desk.supervisor(answers);
      const { code, stdout } = await desk.ctl(['create', 'web1', '--state-blobs', 'plain']);
      assert.equal(code, 0);
      const sent = supervisor.calls.at(-1)?.body as Record<string, string>;
      assert.equal(sent.stateBlobs, 'plain');
      const { verbs } = decode('Delegation', Buffer.from(sent.delegation!, 'base64'));
      assert.deepEqual(verbs, ['MANUFACTURE', 'COLD', 'RESUME', 'IMPORT', 'EXPORT']);
      assert.match(stdout, /state blobs +PLAIN: whoever has the control door takes the whole state out/);
      const odd = await desk.ctl(['create', 'web1', '--state-blobs', 'both']);
      assert.equal(odd.code, 2);
    });

    it('says which doors it has, where that is asked for; set changes them', async () => {
      withKey();
      const supervisor = await desk.supervisor({
        ...answers,
        'PATCH /vtpms/web1': ({ body }) => ({
          body: { ...supervisorVtpm(ID(1), 'web1'), ...(body as object) },
        }),
      });
      assert.equal((await desk.ctl(['create', 'web1', '--doors', 'tpm,ring'])).code, 0);
      assert.deepEqual((supervisor.calls.at(-1)!.body as { doors: string[] }).doors, ['tpm', 'ring']);
      const { code, stdout } = await desk.ctl(['set', 'web1', '--doors', 'tcti']);
      assert.equal(code, 0);
      assert.match(stdout, /changed +web1\ndoors +tcti/);
      assert.deepEqual(supervisor.calls.at(-1)?.body, { doors: ['tcti'] });
      const nothing = await desk.ctl(['set', 'web1']);
      assert.equal(nothing.code, 2);
      assert.match(nothing.stderr, /nothing to change; for example: vtpmctl set web1 --doors tpm,tcti/);
    });

    it('refuses a toolstack key that others may read, one that is cut, and none', async () => {
      await desk.supervisor(answers);
      const missing = await desk.ctl(['create', 'web1']);
      assert.match(missing.stderr, /no toolstack key.*vtpmctl init/);
      withKey();
      chmodSync(desk.paths.toolstack.key, 0o640);
      const open = await desk.ctl(['create', 'web1']);
      assert.equal(open.code, 1);
      assert.match(open.stderr, /chmod 600/);
      chmodSync(desk.paths.toolstack.key, 0o600);
      writeFileSync(desk.paths.toolstack.key, seed.subarray(1));
      assert.match((await desk.ctl(['create', 'web1'])).stderr, /has 31 bytes/);
    });
  });

  describe('list and show', () => {
    const running = {
      state: 'running',
      epoch: 3,
      worker: {
        pid: 42,
        isolation: 'sandbox',
        profile: 'system',
        layers: ['namespace:pid'],
        waived: ['uid'],
        startedAt: '2026-01-01T00:00:00Z',
      },
    };

    it('joins what both daemons know and flags what only one knows', async () => {
      await desk.supervisor({
        'GET /vtpms': {
          body: {
            vtpms: [
              supervisorVtpm(ID(1), 'both', running),
              supervisorVtpm(ID(2), 'fresh'),
              supervisorVtpm(ID(3), 'lost', { epoch: 5 }),
              supervisorVtpm(ID(4), 'gone', { epoch: 5 }),
            ],
          },
        },
      });
      await desk.manager({
        'GET /vtpms?limit=200': {
          body: { vtpms: [managerVtpm(ID(1)), managerVtpm(ID(4), { kind: 'retired' })], next: ID(4) },
        },
        [`GET /vtpms?limit=200&after=${ID(4)}`]: {
          body: { vtpms: [managerVtpm(ID(5)), managerVtpm(ID(6), { kind: 'retired' })] },
        },
      });
      const { code, stdout } = await desk.ctl(['list', '--json']);
      assert.equal(code, 0);
      const { vtpms, missing } = JSON.parse(stdout) as { vtpms: Record<string, unknown>[]; missing: [] };
      assert.deepEqual(missing, []);
      assert.deepEqual(
        vtpms.map(({ name, id, state, generation, orphan }) => [name, id, state, generation, orphan]),
        [
          ['both', ID(1), 'running', 7, null],
          ['fresh', ID(2), 'stopped', 0, null],
          ['lost', ID(3), 'stopped', 0, 'no-state'],
          ['gone', ID(4), 'stopped', 7, 'retired'],
          [null, ID(5), 'unknown', 7, 'no-name'],
        ],
      );
      const text = (await desk.ctl(['list'])).stdout.split('\n');
      assert.match(text[0]!, /^NAME +ID +STATE +GENERATION +SIZE +SAVED +MARKS$/);
      assert.match(text[1]!, /^both +1{8}-.* running +7 +8\.8 KiB +2026-01-02T03:04:05Z +-$/);
      assert.match(text[5]!, /^- +5{8}-.* orphan: .*vtpmctl delete ID/);
    });

    it('does not take a vTPM for an orphan that was made between the two answers', async () => {
      let asked = 0;
      await desk.supervisor({
        'GET /vtpms': () => ({
          body: { vtpms: asked++ === 0 ? [] : [supervisorVtpm(ID(1), 'new', running)] },
        }),
      });
      await desk.manager({ 'GET /vtpms?limit=200': { body: { vtpms: [managerVtpm(ID(1))] } } });
      const { vtpms } = JSON.parse((await desk.ctl(['list', '--json'])).stdout) as {
        vtpms: { name: string; orphan: unknown }[];
      };
      assert.deepEqual(
        vtpms.map(({ name, orphan }) => [name, orphan]),
        [['new', null]],
      );
    });

    it('shows what it can when one daemon is away, flags no orphans, and does not end with 0', async () => {
      await desk.supervisor({ 'GET /vtpms': { body: { vtpms: [supervisorVtpm(ID(3), 'web1', running)] } } });
      const { code, stdout, stderr } = await desk.ctl(['list', '--json']);
      assert.equal(code, 3);
      assert.match(stderr, /incomplete: the manager is not running/);
      const { vtpms } = JSON.parse(stdout) as { vtpms: Record<string, unknown>[] };
      assert.deepEqual([vtpms[0]?.orphan, vtpms[0]?.generation], [null, null]);
    });

    it('show --json has the documented fields', async () => {
      await desk.supervisor({ 'GET /vtpms/web1': { body: supervisorVtpm(ID(1), 'web1', running) } });
      await desk.manager({ [`GET /vtpms/${ID(1)}`]: { body: managerVtpm(ID(1)) } });
      const shown = JSON.parse((await desk.ctl(['show', 'web1', '--json'])).stdout) as Record<
        string,
        unknown
      >;
      const { id, name, state, generation, epoch, worker, sockets, savedBytes, savedAt } = shown;
      const { pid, isolation, layers } = worker as Record<string, unknown>;
      assert.deepEqual([id, name, state, generation, epoch], [ID(1), 'web1', 'running', 7, 3]);
      assert.deepEqual([pid, isolation, layers], [42, 'sandbox', ['namespace:pid']]);
      assert.deepEqual(sockets, { tpm: '/run/t.sock', tcti: '/run/c.sock', control: null, ring: null });
      assert.deepEqual([savedBytes, savedAt], [9000, '2026-01-02T03:04:05.678Z']);
    });

    it('shows in words what happened to a vTPM, and when an old state was accepted', async () => {
      const marked = { generation: 3 * 2 ** 32 + 5, marks: ['rolled-back', 'restored'] };
      const once = { generation: 2 ** 32 + 1, marks: ['recovered'] };
      await desk.supervisor({
        'GET /vtpms': { body: { vtpms: [supervisorVtpm(ID(1), 'web1'), supervisorVtpm(ID(2), 'web2')] } },
        'GET /vtpms/web1': { body: supervisorVtpm(ID(1), 'web1') },
        'GET /vtpms/web2': { body: supervisorVtpm(ID(2), 'web2') },
      });
      await desk.manager({
        'GET /vtpms?limit=200': { body: { vtpms: [managerVtpm(ID(1), marked), managerVtpm(ID(2), once)] } },
        [`GET /vtpms/${ID(1)}`]: { body: managerVtpm(ID(1), marked) },
        [`GET /vtpms/${ID(2)}`]: { body: managerVtpm(ID(2), once) },
      });
      const web1 = (await desk.ctl(['show', 'web1'])).stdout;
      assert.match(web1, /^generation +5, after an old state was accepted at count 3 of the TPM$/m);
      assert.match(web1, /^mark +rolled back: .*lost$/m);
      assert.match(web1, /^mark +restored: .*backup/m);
      const web2 = (await desk.ctl(['show', 'web2'])).stdout;
      assert.match(web2, /^generation +1, after an old state was accepted at count 1 of the TPM$/m);
      assert.match(web2, /^mark +recovered: .*recovery key/m);
      const [, first, second] = (await desk.ctl(['list'])).stdout.split('\n');
      assert.match(
        first ?? '',
        / 5, after an old state was accepted at count 3 of the TPM .* rolled-back, restored$/,
      );
      assert.match(second ?? '', / recovered$/);
    });

    it('shows loudly whose state goes out in the clear, and which TPM is suspended', async () => {
      await desk.supervisor({
        'GET /vtpms/web1': { body: supervisorVtpm(ID(1), 'web1', { stateBlobs: 'plain' }) },
        'GET /vtpms/web2': { body: supervisorVtpm(ID(2), 'web2', { stateBlobs: 'reference' }) },
      });
      await desk.manager({
        [`GET /vtpms/${ID(1)}`]: { body: managerVtpm(ID(1), { marks: ['plain-export'] }) },
        [`GET /vtpms/${ID(2)}`]: { body: managerVtpm(ID(2), { isSuspended: true }) },
      });
      const web1 = (await desk.ctl(['show', 'web1'])).stdout;
      assert.match(web1, /^state blobs +PLAIN: /m);
      assert.match(web1, /^mark +plain export: its whole state was given out in the clear/m);
      assert.doesNotMatch(web1, /suspended/);
      const web2 = (await desk.ctl(['show', 'web2'])).stdout;
      assert.match(web2, /^state blobs +reference$/m);
      assert.match(web2, /^suspended +a reference to its state is out, and works once$/m);
    });

    it('shows of a retired vTPM whether an old disk still opens its state, and until when', async () => {
      const retiredAt = '2026-01-05T00:00:00.000Z';
      const retired = (erasure: object) => ({ kind: 'retired', erasure: { retiredAt, ...erasure } });
      await desk.supervisor({});
      await desk.manager({
        [`GET /vtpms/${ID(1)}`]: {
          body: managerVtpm(ID(1), retired({ isDone: false, due: '2026-01-06T00:00:00.000Z' })),
        },
        [`GET /vtpms/${ID(2)}`]: { body: managerVtpm(ID(2), retired({ isDone: false, due: null })) },
        [`GET /vtpms/${ID(3)}`]: { body: managerVtpm(ID(3), retired({ isDone: true, due: null })) },
      });
      const shown = async (id: string) => (await desk.ctl(['show', id])).stdout;
      assert.match(await shown(ID(1)), /^erased +not yet, retired 2026-01-05T.* at 2026-01-06T00:00:00Z/m);
      assert.match(await shown(ID(2)), /^erased +not yet, .* with the next vtpmctl platform rotate$/m);
      assert.match(await shown(ID(3)), /^erased +yes, .*: no old disk opens its state any more$/m);
    });

    it('shows an orphan of the manager by its id, and ends with 1 on one that nobody knows', async () => {
      await desk.supervisor({});
      await desk.manager({ [`GET /vtpms/${ID(5)}`]: { body: managerVtpm(ID(5)) } });
      const orphan = JSON.parse((await desk.ctl(['show', ID(5), '--json'])).stdout) as { orphan: string };
      assert.equal(orphan.orphan, 'no-name');
      const { code, stderr } = await desk.ctl(['show', 'nobody']);
      assert.equal(code, 1);
      assert.match(stderr, /vtpmctl list/);
    });
  });

  describe('delete', () => {
    const ready = { body: { status: 'ready' } };

    it('stops, forgets and then retires', async () => {
      const supervisor = await desk.supervisor({
        'GET /vtpms/web1': { body: supervisorVtpm(ID(1), 'web1', { state: 'running' }) },
        [`POST /vtpms/${ID(1)}/stop`]: { body: supervisorVtpm(ID(1), 'web1') },
        [`DELETE /vtpms/${ID(1)}`]: { body: { id: ID(1) } },
      });
      let busy = 2;
      const manager = await desk.manager({
        'GET /health': ready,
        [`GET /vtpms/${ID(1)}`]: { body: managerVtpm(ID(1)) },
        [`POST /vtpms/${ID(1)}/retire`]: () =>
          busy-- > 0
            ? { status: 409, body: { error: { code: 'busy', message: 'a worker is connected' } } }
            : { body: { id: ID(1), kind: 'retired' } },
      });
      const { code, stderr, stdout } = await desk.ctl(['delete', 'web1', '--yes', '--json']);
      assert.equal(code, 0, stderr);
      assert.deepEqual(JSON.parse(stdout), { id: ID(1), name: 'web1', retired: true });
      assert.deepEqual(
        supervisor.calls.map(({ method }) => method),
        ['GET', 'POST', 'DELETE'],
      );
      assert.equal(manager.calls.filter(({ path }) => path.endsWith('/retire')).length, 3);
    });

    it('does nothing without --yes where nobody can be asked, nor while the manager is locked', async () => {
      const supervisor = await desk.supervisor({
        'GET /vtpms/web1': { body: supervisorVtpm(ID(1), 'web1') },
      });
      const manager = await desk.manager({ 'GET /health': ready });
      assert.equal((await desk.ctl(['delete', 'web1'])).code, 2);
      manager.replies['GET /health'] = { body: { status: 'locked', message: 'PCR 7 differs' } };
      assert.equal((await desk.ctl(['delete', 'web1', '--yes'])).code, 4);
      assert.ok([...supervisor.calls, ...manager.calls].every(({ method }) => method === 'GET'));
    });

    it('says how to go on when only half of it was done', async () => {
      await desk.supervisor({
        'GET /vtpms/web1': { body: supervisorVtpm(ID(1), 'web1') },
        [`DELETE /vtpms/${ID(1)}`]: { body: { id: ID(1) } },
      });
      await desk.manager({
        'GET /health': ready,
        [`POST /vtpms/${ID(1)}/retire`]: {
          status: 507,
          body: { error: { code: 'store-full', message: 'disk full' } },
        },
      });
      const { code, stderr } = await desk.ctl(['delete', 'web1', '--yes']);
      assert.equal(code, 1);
      assert.match(stderr, new RegExp(`disk full.*vtpmctl delete ${ID(1)}`));
    });
  });

  describe('exec', () => {
    const doors = { tpm: '/d/tpm.sock', tcti: '/d/tcti.sock', control: null, ring: null };
    beforeEach(async () => {
      await desk.supervisor({
        'GET /vtpms/web1': { body: supervisorVtpm(ID(1), 'web1', { state: 'running', sockets: doors }) },
        'GET /vtpms/web2': { body: supervisorVtpm(ID(2), 'web2') },
      });
    });

    it('points tpm2-tools and tpm2-tss at the vTPM, with and without --', async () => {
      for (const dashes of [['--'], []]) {
        const { code, stdout } = await desk.ctl([
          'exec',
          'web1',
          ...dashes,
          'sh',
          '-c',
          'echo $TPM2TOOLS_TCTI $TSS2_TCTI',
        ]);
        assert.equal(code, 0);
        assert.equal(stdout, 'swtpm:path=/d/tcti.sock swtpm:path=/d/tcti.sock\n');
      }
    });

    it('leaves the flags of the program to the program', async () => {
      const { stdout } = await desk.ctl(['exec', 'web1', 'echo', '--json', '--home', '-V', '--', 'x']);
      assert.equal(stdout, '--json --home -V -- x\n');
    });

    it('ends with the status or by the signal of the program', async () => {
      assert.equal((await desk.ctl(['exec', 'web1', '--', 'sh', '-c', 'exit 42'])).code, 42);
      const killed = await desk.ctl(['exec', 'web1', '--', 'sh', '-c', 'kill -USR1 $$']);
      assert.equal(killed.code, null);
    });

    it('hands signals on to the program', async () => {
      const script = 'trap "echo asked; exit 5" TERM; echo ready; while :; do sleep 0.05; done';
      const child = spawn(
        process.execPath,
        [vtpmctl, '--home', desk.paths.home, 'exec', 'web1', 'sh', '-c', script],
        {
          stdio: ['ignore', 'pipe', 'inherit'],
        },
      );
      let said = '';
      child.stdout.setEncoding('utf8').on('data', (text: string) => {
        if (said === '') child.kill('SIGTERM');
        said += text;
      });
      const [code] = (await once(child, 'close')) as [number | null];
      assert.deepEqual([code, said], [5, 'ready\nasked\n']);
    });

    it('hands a signal on that comes while the program is being started', async () => {
      // spawn returns late, as on a busy machine: by then the program runs.
      const hook = `
        import child from 'node:child_process';
        import { syncBuiltinESMExports } from 'node:module';
        const { spawn } = child;
        child.spawn = (...args) => {
          const started = spawn(...args);
          Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 1000);
          return started;
        };
        syncBuiltinESMExports();`;
      const url = `data:text/javascript,${encodeURIComponent(hook)}`;
      const script = 'trap "exit 5" TERM; echo ready; for i in $(seq 200); do sleep 0.05; done';
      const child = spawn(
        process.execPath,
        ['--import', url, vtpmctl, '--home', desk.paths.home, 'exec', 'web1', 'sh', '-c', script],
        { stdio: ['ignore', 'pipe', 'inherit'] },
      );
      child.stdout.once('data', () => child.kill('SIGTERM'));
      assert.deepEqual(await once(child, 'exit'), [5, null]);
    });

    it('refuses what is not running and programs that do not exist', async () => {
      const stopped = await desk.ctl(['exec', 'web2', '--', 'true']);
      assert.equal(stopped.code, 3);
      assert.match(stopped.stderr, /vtpmctl start web2/);
      const { code, stderr } = await desk.ctl(['exec', 'web1', '--', 'no-such-program']);
      assert.equal(code, 1);
      assert.match(stderr, /no program "no-such-program"/);
    });
  });

  describe('image', () => {
    const digest = 'ab'.repeat(32);

    it('allows the image that the supervisor runs, and lists which one it is', async () => {
      await desk.supervisor({ 'GET /image': { body: { digest, parts: [] } } });
      const manager = await desk.manager({
        'POST /images': { status: 201, body: {} },
        'GET /images': { body: { images: [{ digest, note: 'n', allowedAt: null }] } },
      });
      assert.equal((await desk.ctl(['image', 'allow', '--note', 'release 1'])).code, 0);
      assert.deepEqual(manager.calls.at(-1)?.body, { digest, note: 'release 1' });
      const listed = JSON.parse((await desk.ctl(['image', 'list', '--json'])).stdout) as {
        images: { digest: string; current: boolean }[];
      };
      assert.deepEqual(
        listed.images.map((image) => [image.digest, image.current]),
        [[digest, true]],
      );
    });
  });

  describe('logs', () => {
    it('shows both daemons in order of time, and of one vTPM its worker too', async () => {
      mkdirSync(desk.paths.log, { recursive: true });
      const line = (time: number, name: string, msg: string, extra: object = {}) =>
        `${JSON.stringify({ level: 30, time, name, msg, ...extra })}\n`;
      writeFileSync(
        `${desk.paths.log}/manager.log`,
        line(1, 'vtpm-managerd', 'one') + line(4, 'vtpm-managerd', 'four', { vtpm: ID(1) }),
      );
      writeFileSync(
        `${desk.paths.log}/supervisor.log`,
        `${line(2, 'vtpm-supervisord', 'two', { vtpm: 'web1' })}    at a stack\n${line(5, 'vtpm-supervisord', 'five')}{"half`,
      );
      writeFileSync(`${desk.paths.log}/vtpm-web1.log`, line(3, 'vtpmd', 'three'));
      const messages = (text: string) =>
        text
          .trim()
          .split('\n')
          .map((shown) => /: (\w+)|(stack)/.exec(shown)?.slice(1).join(''));
      assert.deepEqual(messages((await desk.ctl(['logs'])).stdout), ['one', 'two', 'stack', 'four', 'five']);
      assert.deepEqual(messages((await desk.ctl(['logs', '-n', '2'])).stdout), ['four', 'five']);
      await desk.supervisor({ 'GET /vtpms/web1': { body: supervisorVtpm(ID(1), 'web1') } });
      assert.deepEqual(messages((await desk.ctl(['logs', 'web1'])).stdout), ['two', 'three', 'four']);
      const json = (await desk.ctl(['logs', '--json', '-n', '1'])).stdout;
      assert.equal((JSON.parse(json) as { msg: string }).msg, 'five');
      assert.ok(readFileSync(`${desk.paths.log}/manager.log`).length > 0);
    });
  });
});
