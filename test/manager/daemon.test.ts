import assert from 'node:assert/strict';
import { once } from 'node:events';
import {
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { type IncomingMessage, request } from 'node:http';
import { connect } from 'node:net';
import { join } from 'node:path';
import { ManagerInstallation, StandInTpm } from '../support/manager-process.js';
import { until } from '../support/until.js';
import { type RefusedError, testVtpm } from '../support/worker-client.js';

const DIGEST = 'ab'.repeat(32);

async function throws(promise: Promise<unknown>, pattern: RegExp): Promise<void> {
  await assert.rejects(promise, (error: Error) => {
    assert.match(error.message, pattern);
    return true;
  });
}

describe('vtpm-managerd with the embedded TPM', () => {
  let manager: ManagerInstallation;
  let managerId: string;

  beforeEach(async () => {
    manager = new ManagerInstallation();
    managerId = String((await manager.init('embedded')).managerId);
  });
  afterEach(() => manager.remove());

  /** A worker with a manufactured vTPM, generation 1. */
  async function manufactured() {
    const image = { digest: manager.toolstack.imageDigest.toString('hex'), note: 'test' };
    assert.equal((await manager.admin('POST', '/images', image)).status, 201);
    const vtpm = testVtpm();
    const worker = manager.worker(managerId);
    const grant = await worker.load(manager.toolstack.ticket(worker.managerId, vtpm, worker.keys.publicKey));
    const session = await worker.session(vtpm, grant);
    await session.save({ permanent: Buffer.from('P1') });
    return { vtpm, worker, session };
  }

  it('starts, says how it is, and stops in order', async () => {
    const health = await manager.start();
    assert.equal(health.status, 'ready');
    assert.equal(health.managerId, managerId);
    assert.equal(health.vtpms, 0);
    assert.deepEqual((health.tpm as Record<string, unknown>).hardwareProtected, false);
    assert.match(manager.stderr, /nothing is hardware-protected/);
    const sockets = [manager.paths.adminSocket, manager.paths.workerSocket, manager.paths.toolstackSocket];
    for (const path of sockets) assert.equal(statSync(path).mode & 0o777, 0o600);
    assert.equal(await manager.stop(), 0);
    for (const path of [...sockets, manager.paths.softtpmSocket]) assert.ok(!existsSync(path), path);
  });

  it('says that it is ready when workers can connect, not before', async () => {
    const slow = `import { Server } from 'node:net';
      const { listen } = Server.prototype;
      Server.prototype.listen = function (...args) {
        setTimeout(() => listen.apply(this, args), String(args[0]).endsWith('worker.sock') ? 500 : 0);
        return this;
      };`;
    const started = manager.start({
      nodeArgs: ['--import', `data:text/javascript,${encodeURIComponent(slow)}`],
    });
    const health = () => manager.admin('GET', '/health').catch(() => undefined);
    await until('the manager is ready', async () => (await health())?.body.status === 'ready');
    await once(connect(manager.paths.workerSocket), 'connect');
    await started;
  });

  it('lets no second manager on its directory, nor a second init', async () => {
    await manager.start();
    const second = await manager.run();
    assert.equal(second.code, 1);
    assert.match(second.stderr, /another vtpm-managerd runs on .*\(in-use\)/);
    await throws(manager.init('embedded'), /\(in-use\)/);
    assert.equal((await manager.admin('GET', '/health')).body.status, 'ready');
    await manager.stop();
    await throws(manager.init('embedded'), /\(already-initialised\)/);
    await manager.start();
  });

  it('goes on with a session after kill -9', async () => {
    await manager.start();
    const { vtpm, worker, session } = await manufactured();
    await session.save({ permanent: Buffer.from('P2') });
    const instance = (await manager.admin('GET', '/health')).body.instance;
    await manager.stop('SIGKILL');
    assert.ok(await session.stream!.ended);
    worker.close();
    const health = await manager.start();
    assert.notEqual(health.instance, instance);
    assert.equal(health.vtpms, 1);
    const again = manager.worker(managerId);
    const ack = await session.connect(again.openStream());
    assert.equal(ack.committed, 2n);
    assert.equal(ack.generation, 2n);
    assert.equal((await session.save({ permanent: Buffer.from('P3') })).generation, 3n);
    const next = manager.worker(managerId);
    const grant = await next.load(
      manager.toolstack.ticket(next.managerId, vtpm, next.keys.publicKey, {
        expectedEpoch: 1n,
        verbs: ['COLD'],
      }),
    );
    assert.equal(Buffer.from(grant.permanent).toString(), 'P3');
    again.close();
    next.close();
  });

  it('tells a worker on SIGTERM that it will be back', async () => {
    await manager.start();
    const { worker, session } = await manufactured();
    const stopped = manager.stop();
    const ended = (await session.stream!.ended) as RefusedError;
    assert.equal(ended.reason, 'shutting-down');
    assert.equal(await stopped, 0);
    worker.close();
  });

  it('opens and verifies the store again when its process was killed', async () => {
    await manager.start();
    const { worker, session } = await manufactured();
    const store = storeProcess(manager);
    process.kill(store, 'SIGKILL');
    assert.ok(await session.stream!.ended);
    while ((await manager.admin('GET', '/health')).body.status !== 'ready') {
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
    assert.equal((await session.connect(worker.openStream())).generation, 1n);
    assert.equal((await session.save({ permanent: Buffer.from('P2') })).generation, 2n);
    worker.close();
  });

  it('I-9 does not start without its store, or with an empty one', async () => {
    await manager.start();
    await manager.stop();
    const aside = join(manager.home, 'aside');
    renameSync(manager.paths.store, aside);
    await throws(manager.start(), /\(store-missing\)/);
    mkdirSync(manager.paths.store);
    await throws(manager.start(), /\(store-missing\)/);
    writeFileSync(join(manager.paths.store, 'lock'), '');
    await throws(manager.start(), /\(store-missing\)/);
    assert.ok(!existsSync(join(manager.paths.store, 'data.mdb')));
    rmSync(manager.paths.store, { recursive: true });
    renameSync(aside, manager.paths.store);
    assert.equal((await manager.start()).status, 'ready');
  });

  it('I-9 does not start without enrolment, nor take what is left for a first init', async () => {
    const { enrolment } = manager.paths;
    renameSync(enrolment, `${enrolment}.aside`);
    await throws(manager.start(), /there is a store .* but no .*\(not-initialised\)/);
    await throws(manager.init('embedded'), /an init that did not finish, or an enrolment that was lost/);
    renameSync(`${enrolment}.aside`, enrolment);
    assert.equal((await manager.start()).status, 'ready');
  });

  it('I-9 does not start with an enrolment that was edited, or an embedded TPM that is gone', async () => {
    const { enrolment, softtpm } = manager.paths;
    const good = readFileSync(enrolment, 'utf8');
    writeFileSync(enrolment, good.replace(/"createdAt": "20/, '"createdAt": "21'));
    await throws(manager.start(), /was changed since it was written.*\(store-corrupt\)/);
    writeFileSync(enrolment, good.replace('"format": 2', '"format": 3'));
    await throws(manager.start(), /\(newer-format\)/);
    writeFileSync(enrolment, good.replace('"format": 2', '"format": 1'));
    await throws(manager.start(), /\(older-format\)/);
    writeFileSync(enrolment, good);
    renameSync(softtpm, `${softtpm}.aside`);
    await throws(manager.start(), /\(tpm-unreachable\)/);
    rmSync(softtpm, { recursive: true, force: true });
    renameSync(`${softtpm}.aside`, softtpm);
    assert.equal((await manager.start()).status, 'ready');
  });

  it('lists, shows and retires vTPMs', async () => {
    await manager.start();
    const { vtpm, worker, session } = await manufactured();
    const { body } = await manager.admin('GET', `/vtpms/${vtpm.id}`);
    assert.equal(body.generation, 1);
    assert.equal(body.epoch, 1);
    assert.equal(body.kind, 'live');
    assert.equal((body.session as { connected: boolean }).connected, true);
    assert.deepEqual((await manager.admin('GET', '/vtpms?limit=1')).body, { vtpms: [body] });
    assert.deepEqual((await manager.admin('GET', `/vtpms?after=${vtpm.id}`)).body, { vtpms: [] });
    assert.equal((await manager.admin('POST', `/vtpms/${vtpm.id}/retire`)).status, 409);
    session.stream!.end();
    await session.stream!.ended;
    const retired = await manager.admin('POST', `/vtpms/${vtpm.id}/retire`);
    assert.deepEqual(retired, { status: 200, body: { id: vtpm.id, kind: 'retired' } });
    assert.equal((await manager.admin('POST', `/vtpms/${testVtpm().id}/retire`)).status, 404);
    worker.close();
  });

  it('keeps the list of images, and writes down who changed it', async () => {
    await manager.start();
    assert.equal((await manager.admin('POST', '/images', { digest: DIGEST, note: 'n' })).status, 201);
    const entry = JSON.parse(readFileSync(manager.paths.audit, 'utf8').trim().split('\n').at(-1)!);
    assert.equal(entry.action, 'image-allow');
    assert.equal(entry.actor.uid, process.getuid!());
    assert.equal(entry.facts.digest, DIGEST);
    const { images } = (await manager.admin('GET', '/images')).body as { images: { digest: string }[] };
    assert.deepEqual(
      images.map(({ digest }) => digest),
      [DIGEST],
    );
    await manager.stop('SIGKILL');
    await manager.start();
    assert.equal((await manager.admin('DELETE', `/images/${DIGEST}`)).status, 200);
    assert.equal((await manager.admin('DELETE', `/images/${DIGEST}`)).status, 404);
  });

  it('refuses bad admin calls by name', async () => {
    await manager.start();
    for (const [method, path, body, status] of [
      ['GET', '/nothing', undefined, 404],
      ['PUT', '/images', '{}', 405],
      ['GET', '/vtpms?colour=red', undefined, 400],
      ['GET', '/vtpms/not-a-uuid', undefined, 400],
      ['GET', '/vtpms?limit=0', undefined, 400],
      ['POST', '/images', '{}', 400],
      ['POST', '/images', 'not json', 400],
      ['POST', '/images', '[]', 400],
      ['POST', '/images', `{"digest":"${'a'.repeat(70_000)}"}`, 413],
    ] as const) {
      const answer = await manager.admin(method, path, body);
      assert.equal(answer.status, status, `${method} ${path}`);
      assert.ok((answer.body.error as { code: string }).code);
    }
  });

  it('streams what happens', async () => {
    await manager.start();
    const call = request({ socketPath: manager.paths.adminSocket, path: '/events' });
    call.end();
    const [response] = (await once(call, 'response')) as [IncomingMessage];
    const types: string[] = [];
    const saved = (async () => {
      let text = '';
      for await (const chunk of response.setEncoding('utf8')) {
        text += chunk;
        types.splice(
          0,
          types.length,
          ...text
            .split('\n')
            .slice(0, -1)
            .map((line) => JSON.parse(line).type),
        );
        if (types.includes('saved')) return;
      }
    })();
    const { worker } = await manufactured();
    await saved;
    assert.deepEqual(types, ['hello', 'loaded', 'link-up', 'saved']);
    worker.close();
  });
});

describe('vtpm-managerd with a swtpm that stands in for the chip', () => {
  let manager: ManagerInstallation;
  let tpm: StandInTpm;

  beforeEach(async () => {
    manager = new ManagerInstallation();
    tpm = new StandInTpm();
    await tpm.start();
  });
  afterEach(async () => {
    await manager.remove();
    await tpm.stop();
  });

  it('stays up locked when the platform state is another one', async () => {
    const { managerId } = await manager.init(`unix:${tpm.socket}`);
    assert.equal((await manager.start()).status, 'ready');
    await manager.stop();
    await tpm.extendPcr(7);
    const health = await manager.start();
    assert.equal(health.status, 'locked');
    assert.equal(health.reason, 'platform-policy');
    assert.equal(health.vtpms, null);
    const images = await manager.admin('GET', '/images');
    assert.equal(images.status, 503);
    assert.equal((images.body.error as { code: string }).code, 'locked');
    const worker = manager.worker(String(managerId));
    const ticket = manager.toolstack.ticket(worker.managerId, testVtpm(), worker.keys.publicKey);
    await assert.rejects(worker.load(ticket), (error: RefusedError) => error.reason === 'locked');
    worker.close();
    assert.equal(await manager.stop(), 0);
  });

  it('does not mind a PCR that is not selected', async () => {
    await manager.init(`unix:${tpm.socket}`);
    await tpm.extendPcr(16);
    assert.equal((await manager.start()).status, 'ready');
  });

  it('leaves nothing behind when init fails', async () => {
    await throws(manager.init(`unix:${manager.home}/nothing`), /\(tpm-unreachable\)/);
    await throws(manager.init(`unix:${tpm.socket}`, '--pcrs', 'sha256:99'), /./);
    await throws(manager.init('somewhere'), /\(bad-request\)/);
    await manager.init(`unix:${tpm.socket}`);
    assert.equal((await manager.start()).status, 'ready');
  });
});

/** The pid of the process that has the manager's store, found by its command line. */
function storeProcess(manager: ManagerInstallation): number {
  const pids = readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name))
    .map(Number)
    .filter((pid) => {
      try {
        const words = readFileSync(`/proc/${pid}/cmdline`, 'utf8').split('\0');
        return words[0] === process.execPath && words.includes(manager.paths.store);
      } catch {
        return false;
      }
    });
  assert.equal(pids.length, 1);
  return pids[0]!;
}
