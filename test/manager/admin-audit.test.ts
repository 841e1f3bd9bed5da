import assert from 'node:assert/strict';
import { once } from 'node:events';
import { readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { type IncomingMessage, request } from 'node:http';
import { ManagerInstallation, StandInTpm } from '../support/manager-process.js';
import { testVtpm } from '../support/worker-client.js';

const DIGEST = 'cd'.repeat(32);

interface Entry {
  readonly n: number;
  readonly actor: unknown;
  readonly action: string;
  readonly verdict: string;
  readonly vtpm?: string;
  readonly reason?: { readonly code: string };
  readonly facts?: Record<string, string>;
}

describe('the audit log on the admin plane', () => {
  let manager: ManagerInstallation;
  let managerId: string;
  const me = { uid: process.getuid?.() };

  beforeEach(async () => {
    manager = new ManagerInstallation();
    managerId = String((await manager.init('embedded')).managerId);
  });
  afterEach(() => manager.remove());

  const tail = async (count: number): Promise<Entry[]> => {
    const { status, body } = await manager.admin('GET', `/audit?tail=${count}`);
    assert.equal(status, 200, JSON.stringify(body));
    return body.entries as Entry[];
  };
  const codeOf = (body: Record<string, unknown>) => (body.error as { code: string }).code;
  /** Changes one character of an entry that is anchored, without changing the file's length. */
  const forge = (): void => {
    const text = readFileSync(manager.paths.audit, 'utf8');
    writeFileSync(manager.paths.audit, text.replace('"action":"init"', '"action":"stop"'));
  };

  it('shows the newest entries, each change with the uid of its caller', async () => {
    await manager.start();
    await manager.admin('POST', '/images', { digest: DIGEST, note: 'n' });
    await manager.admin('DELETE', `/images/${DIGEST}`);
    const entries = await tail(4);
    assert.deepEqual(
      entries.map(({ action, verdict, actor, facts }) => [action, verdict, actor, facts?.digest]),
      [
        ['image-allow', 'intended', me, DIGEST],
        ['image-allow', 'done', me, DIGEST],
        ['image-remove', 'intended', me, DIGEST],
        ['image-remove', 'done', me, DIGEST],
      ],
    );
    assert.deepEqual(
      entries.map(({ n }) => n),
      [0, 1, 2, 3].map((i) => (entries[0]?.n ?? 0) + i),
    );
    for (const query of ['tail=0', 'tail=1001', 'tail=x', 'tial=1']) {
      const { status, body } = await manager.admin('GET', `/audit?${query}`);
      assert.deepEqual([status, codeOf(body)], [400, 'bad-request'], query);
    }
  });

  it('has every change that was asked for and refused, with the uid of its caller', async () => {
    await manager.start();
    const image = { digest: manager.toolstack.imageDigest.toString('hex') };
    await manager.admin('POST', '/images', image);
    const vtpm = testVtpm();
    const worker = manager.worker(managerId);
    const grant = await worker.load(manager.toolstack.ticket(worker.managerId, vtpm, worker.keys.publicKey));
    await worker.session(vtpm, grant);
    const unknown = testVtpm().id;
    for (const [method, path, body, status, expected] of [
      ['POST', '/images', 'no json', 400, { action: 'image-allow', code: 'bad-request' }],
      ['POST', '/images', { digest: 'x' }, 400, { action: 'image-allow', code: 'bad-request' }],
      ['DELETE', `/images/${DIGEST}`, undefined, 404, { action: 'image-remove', code: 'unknown-image' }],
      ['POST', `/vtpms/${vtpm.id}/retire`, undefined, 409, { action: 'retire', code: 'busy', id: vtpm.id }],
      [
        'POST',
        `/vtpms/${unknown}/retire`,
        undefined,
        404,
        { action: 'retire', code: 'unknown-vtpm', id: unknown },
      ],
      ['POST', '/vtpms/x/retire', undefined, 400, { action: 'retire', code: 'bad-request' }],
    ] as const) {
      const answer = await manager.admin(method, path, body);
      assert.equal(answer.status, status, path);
      const [entry] = await tail(1);
      const { action, code, id } = expected as { action: string; code: string; id?: string };
      assert.deepEqual(
        [entry?.action, entry?.verdict, entry?.reason?.code, entry?.vtpm, entry?.actor],
        [action, 'refused', code, id, me],
        path,
      );
    }
    worker.close();
  });

  it('verifies itself, and names the entry that was changed', async () => {
    await manager.start();
    const { body } = await manager.admin('GET', '/audit/verify');
    assert.deepEqual([body.checked, body.isWhole, body.first, body.unanchored], ['anchor', true, 1, 0]);
    assert.equal(body.authenticated, body.last);
    forge();
    const after = await manager.admin('GET', '/audit/verify');
    assert.equal(after.status, 200);
    assert.deepEqual([after.body.isWhole, (after.body.flaw as { entry: number }).entry], [false, 1]);
    const newest = await manager.admin('GET', '/audit');
    assert.deepEqual([newest.status, codeOf(newest.body)], [500, 'audit-corrupt']);
    // It had begun: what came is not to be taken for the whole.
    await assert.rejects(exported('/audit/export'), /aborted/);
    assert.match(manager.stderr, /an admin call broke off.*entry 2 does not follow entry 1/);
  });

  it('gives its entries out as they are in the file, and writes down to whom', async () => {
    await manager.start();
    for (let i = 0; i < 5; i++) await manager.admin('DELETE', `/images/${DIGEST}`);
    const file = readFileSync(manager.paths.audit, 'utf8').split('\n').slice(0, -1);
    assert.equal(await exported('/audit/export'), file.map((line) => `${line}\n`).join(''));
    assert.equal(
      await exported('/audit/export?from=2&to=4'),
      file
        .slice(1, 4)
        .map((line) => `${line}\n`)
        .join(''),
    );
    const [entry] = await tail(1);
    assert.deepEqual(
      [entry?.action, entry?.actor, entry?.facts],
      ['audit-export', me, { from: '2', to: '4' }],
    );
    for (const query of ['from=4&to=2', 'from=1000', 'from=0']) {
      assert.equal((await manager.admin('GET', `/audit/export?${query}`)).status, 400, query);
    }
  });

  it('is verified while the manager is stopped, with its keys and without', async () => {
    await manager.start();
    // The anchor of this change has the entries before it.
    await manager.admin('POST', '/images', { digest: DIGEST });
    assert.match((await manager.run('audit-verify')).stderr, /\(in-use\)/);
    await manager.stop();
    const check = async () => {
      const { code, stdout, stderr } = await manager.run('audit-verify', '--json');
      assert.equal(code, 0, stderr);
      return JSON.parse(stdout) as Record<string, unknown>;
    };
    const good = await check();
    assert.deepEqual([good.checked, good.isWhole, good.authenticated], ['anchor', true, good.last]);
    const { softtpm, audit } = manager.paths;
    renameSync(softtpm, `${softtpm}.aside`);
    const chain = await check();
    assert.deepEqual([chain.checked, chain.isWhole, chain.authenticated], ['chain', true, 0]);
    assert.match(String(chain.because), /./);
    const whole = readFileSync(audit, 'utf8');
    forge();
    const forged = await check();
    assert.deepEqual([forged.checked, forged.isWhole], ['chain', false]);
    assert.equal((forged.flaw as { entry: number }).entry, 2);
    // Cut off at its end: only the anchor tells.
    writeFileSync(audit, `${whole.split('\n').slice(0, 1).join('\n')}\n`);
    assert.equal((await check()).isWhole, true);
    rmSync(softtpm, { recursive: true, force: true });
    renameSync(`${softtpm}.aside`, softtpm);
    const cut = await check();
    assert.deepEqual([cut.checked, cut.isWhole], ['anchor', false]);
    assert.match((await manager.run('audit-verify')).stdout, /^DAMAGED {3}entry \d+ of .* is missing/);
  });

  async function exported(path: string): Promise<string> {
    const call = request({ socketPath: manager.paths.adminSocket, path });
    call.end();
    const [response] = (await once(call, 'response')) as [IncomingMessage];
    assert.equal(response.statusCode, 200);
    assert.equal(response.headers['content-type'], 'application/x-ndjson');
    let text = '';
    for await (const chunk of response.setEncoding('utf8')) text += chunk;
    return text;
  }
});

describe('the audit log of a manager that is locked', () => {
  it('has its chain verified, which is said, and shows nothing', async () => {
    const tpm = new StandInTpm();
    const manager = new ManagerInstallation();
    try {
      await tpm.start();
      await manager.init(`unix:${tpm.socket}`);
      await tpm.extendPcr(7);
      assert.equal((await manager.start()).status, 'locked');
      const { status, body } = await manager.admin('GET', '/audit/verify');
      assert.deepEqual([status, body.checked, body.isWhole], [200, 'chain', true]);
      assert.match(String(body.because), /locked/);
      for (const path of ['/audit', '/audit/export']) {
        assert.equal((await manager.admin('GET', path)).status, 503, path);
      }
    } finally {
      await manager.remove();
      await tpm.stop();
    }
  });
});
