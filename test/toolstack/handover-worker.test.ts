import assert from 'node:assert/strict';
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { Socket } from 'node:net';
import { join } from 'node:path';
import { createLogger, socketPair } from 'vtpm-common';
import type { ToolstackError } from 'vtpm-toolstack/error';
import { InheritedDescriptors, KeptDescriptors } from 'vtpm-toolstack/supervisor/handover/descriptors';
import { WorkerLedger } from 'vtpm-toolstack/supervisor/leftovers';
import { isAlive } from 'vtpm-toolstack/supervisor/processes';
import { passingRetryMs } from 'vtpm-toolstack/supervisor/restart-policy';
import { adoptBody } from 'vtpm-toolstack/supervisor/worker-body';
import { WorkerProcess } from 'vtpm-toolstack/supervisor/worker-process';
import { reapAtExit } from '../support/reap.js';
import { removeDirectory, temporaryDirectory } from './supervisor-fixture.js';

describe('a worker that does not read what its supervisor says', () => {
  let directory: string;
  let child: ChildProcess;
  let worker: WorkerProcess;
  let theirs: number;
  let exit: () => void;
  let release: () => Promise<void>;

  beforeEach(() => {
    directory = temporaryDirectory();
    child = reapAtExit(spawn('/bin/sleep', ['1000'], { stdio: 'ignore' }));
    const [ours, other] = socketPair();
    theirs = other;
    release = async () => undefined;
    const log = createLogger('test', { 'log-level': 'silent', 'log-format': 'json' });
    worker = new WorkerProcess({
      body: {
        child: {
          pid: child.pid,
          hasExited: false,
          exited: new Promise((resolve) => {
            exit = () => resolve('exit status 0');
          }),
          kill: () => child.kill('SIGKILL'),
        },
        control: new Socket({ fd: ours }),
        descriptors: socketPair()[0],
        output: undefined,
      },
      confinement: {
        check: () => [],
        layers: () => [],
        release: () => release(),
        handOver: () => ({ uid: null, groups: [] }),
      },
      image: { digest: '0'.repeat(64) },
      isolation: 'none',
      ledger: new WorkerLedger(join(directory, 'workers.json'), log),
      workerSocket: join(directory, 'none'),
      owner: { logPath: join(directory, 'log'), log, onMessage: () => undefined },
    });
    // More than the kernel holds for it.
    for (let peer = 0; peer < 20_000; peer++) worker.send({ type: 'peer-gone', peer });
  });
  afterEach(() => {
    child.kill('SIGKILL');
    removeDirectory(directory);
  });

  it('counts as late and not as failed where it is not ready in time, and only then', async () => {
    const failure = (type: 'ready' | 'serving') => worker.waitFor(type, 1).catch((error: unknown) => error);
    const late = (await failure('ready')) as ToolstackError;
    assert.equal(late.code, 'worker-late');
    assert.ok(passingRetryMs(late), 'a restart does not count it');
    assert.equal(passingRetryMs((await failure('serving')) as ToolstackError), undefined);
  });

  it('is handed over where it reads after all: nothing that was said is lost', async () => {
    let heard = '';
    const reader = new Socket({ fd: theirs }).setEncoding('utf8');
    reader.on('data', (text: string) => {
      heard += text;
    });
    await worker.whenHeard(60_000);
    assert.notEqual(worker.handOver(new KeptDescriptors()).control, null);
    while (!heard.includes('19999')) await once(reader, 'data');
    assert.equal(heard.trim().split('\n').length, 20_000);
    reader.destroy();
  });

  it('is handed over whole while what confined it is still being removed', async () => {
    let goOn: () => void = () => undefined;
    const isReleasing = new Promise<void>((releasing) => {
      release = () => {
        releasing();
        return new Promise((resolve) => {
          goOn = resolve;
        });
      };
    });
    child.kill('SIGKILL');
    exit();
    await isReleasing;
    const kept = new KeptDescriptors();
    const facts = worker.handOver(kept);
    assert.doesNotThrow(() => new InheritedDescriptors(kept.all).takeSocket(facts.descriptors));
    goOn();
    await worker.ended;
  });

  it('is waited for so long and no longer, and then ended by the next program', async () => {
    await worker.whenHeard(50);
    const kept = new KeptDescriptors();
    const facts = worker.handOver(kept);
    assert.equal(facts.control, null);
    const body = adoptBody(facts, new InheritedDescriptors(kept.all));
    // Who reaps it, libuv or the adopted one, is left to chance here.
    await body.child.exited;
    assert.ok(facts.processes.length > 0 && !facts.processes.some(isAlive));
  });
});
