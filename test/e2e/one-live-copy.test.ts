import assert from 'node:assert/strict';
import { readdirSync, readFileSync } from 'node:fs';
import { uuidToBytes } from 'vtpm-proto';
import { connectGuest } from 'vtpm-quickstart/guest';
import { Installation } from '../support/installation.js';
import { until } from '../support/until.js';
import { TestToolstack, WorkerClient } from '../support/worker-client.js';

describe('I-3 at most one live copy of a vTPM on a host', () => {
  let installation: Installation;
  beforeEach(async () => {
    installation = await Installation.create();
    await installation.start();
  });
  afterEach(() => installation?.destroy());

  const state = async () => (await installation.supervisord('GET', '/vtpms/web1')).body;

  it('is not started a second time while it runs, by any caller', async () => {
    await installation.vtpm('web1');
    const starts = await Promise.all(
      Array.from({ length: 3 }, () => installation.supervisord('POST', '/vtpms/web1/start')),
    );
    for (const { status, body } of starts) {
      assert.equal(status, 409, JSON.stringify(body));
    }
    assert.equal(liveWorkers(installation).length, 1);
  });

  it('has no worker left when its next epoch begins, even one that could not hear the end of its supervisor', async () => {
    // Unconfined, so that nothing but the next supervisor's reaping ends it; stopped, so that it hears nothing.
    await installation.vtpm('web1', '--isolation', 'none');
    const old = await installation.workerPid('web1');
    process.kill(old, 'SIGSTOP');
    try {
      await installation.killSupervisor();
      assert.ok(isRunning(old), 'positive control: without reaping the old worker lives on');
      await installation.startSupervisor();
      assert.ok(!isRunning(old), 'the old worker is gone before anything can be asked of the new supervisor');
    } finally {
      if (isRunning(old)) process.kill(old, 'SIGKILL');
    }
    await installation.ctlJson('start', 'web1');
    assert.equal(liveWorkers(installation).length, 1);
  });

  it('answers nothing more once another epoch owns it: the second belt', async () => {
    const guest = await connectGuest(await installation.vtpm('web1'));
    await guest.defineCounter();
    const last = await guest.counter();
    const shown = await installation.ctlJson('show', 'web1');
    const image = (await installation.supervisord('GET', '/image')).body.digest as string;
    const manager = JSON.parse(readFileSync(installation.paths.toolstack.managerIdentity, 'utf8')) as {
      managerId: string;
    };
    const managerId = Buffer.from(manager.managerId, 'hex');

    // Whoever holds the toolstack key may sign for the next epoch while a worker lives; the manager then fences that one.
    const toolstack = new TestToolstack(
      readFileSync(installation.paths.toolstack.key),
      Buffer.from(image, 'hex'),
    );
    const vtpm = {
      id: String(shown.id),
      uuid: uuidToBytes(String(shown.id)),
      vmUuid: uuidToBytes(String(shown.vmUuid)),
    };
    const rival = new WorkerClient(installation.paths.manager.workerSocket, managerId);
    const grant = await rival.load(
      toolstack.ticket(managerId, vtpm, rival.keys.publicKey, {
        verbs: ['COLD'],
        expectedEpoch: BigInt(shown.epoch as number),
      }),
    );
    assert.equal(grant.epoch, BigInt(shown.epoch as number) + 1n);
    await assert.rejects(guest.increment(), 'the fenced worker must not answer');
    await until('the fenced worker is gone', async () => (await state()).state === 'crashed');
    assert.match(String((await state()).reason), /fenced/);
    rival.close();

    await installation.ctlJson('start', 'web1');
    const again = await connectGuest(installation.door('web1'));
    assert.equal(await again.counter(), last, 'what was not answered did not happen');
    await again.close();
  });
});

/** Processes below the supervisor that run the worker, the sandbox around it not counted. */
function liveWorkers(installation: Installation): number[] {
  const parents = new Map<number, number>();
  for (const name of readdirSync('/proc').filter((entry) => /^\d+$/.test(entry))) {
    try {
      const stat = readFileSync(`/proc/${name}/stat`, 'utf8');
      parents.set(Number(name), Number(stat.slice(stat.lastIndexOf(')') + 2).split(' ')[1]));
    } catch {
      // It ended meanwhile.
    }
  }
  const isBelow = (pid: number): boolean => {
    for (let at: number | undefined = parents.get(pid); at; at = parents.get(at)) {
      if (at === installation.supervisor?.pid) return true;
    }
    return false;
  };
  return [...parents.keys()].filter(
    (pid) => isBelow(pid) && commandOf(pid).includes('vtpmd.cjs') && !/^\S*bwrap /.test(commandOf(pid)),
  );
}

function commandOf(pid: number): string {
  try {
    return readFileSync(`/proc/${pid}/cmdline`, 'utf8').replaceAll('\0', ' ');
  } catch {
    return '';
  }
}

function isRunning(pid: number): boolean {
  try {
    return !/^State:\s+[ZX]/m.test(readFileSync(`/proc/${pid}/status`, 'utf8'));
  } catch {
    return false;
  }
}
