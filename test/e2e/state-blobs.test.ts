import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { createConnection } from 'node:net';
import { Installation } from '../support/installation.js';
import { type Swtpm, startSwtpm } from '../support/swtpm.js';
import { controlOf, NO_PCR, SwtpmIoctl, seenBy, useTpm, withGuest } from '../support/swtpm-ioctl.js';
import { TpmClient } from '../support/tpm-client.js';
import { readClock, responseCode } from '../support/tpm-commands.js';
import { until } from '../support/until.js';
import { u32, Vmm } from '../support/vmm.js';

/** Results of the control protocol, and of the TPM. */
const TPM_RETRY = 0x800;
const TPM_RC_FAILURE = 0x101;

describe('state blobs over the control door', function () {
  this.timeout(60_000);
  let installation: Installation;
  let vmm: SwtpmIoctl;
  const swtpms: Swtpm[] = [];
  before(async () => {
    vmm = new SwtpmIoctl();
    installation = await Installation.create();
    await installation.start();
  });
  after(async () => {
    await installation?.destroy();
    for (const swtpm of swtpms) await swtpm.stop();
    vmm.close();
  });

  const create = (name: string, ...args: string[]) =>
    installation.vtpm(name, '--startup', 'clear', '--doors', 'control,tpm', ...args);

  /** A vTPM that is on, with what a guest put into it. */
  async function used(name: string) {
    const door = await create(name);
    const control = controlOf(installation, name);
    await vmm.do(control, '-i');
    await useTpm(door);
    return { door, control, before: await seenBy(door) };
  }

  async function swtpmOf(): Promise<Swtpm> {
    const swtpm = await startSwtpm();
    swtpms.push(swtpm);
    return swtpm;
  }

  async function marksOf(name: string): Promise<unknown> {
    return (await installation.ctlJson('show', name)).marks;
  }

  async function auditOf(name: string): Promise<string[]> {
    const { id } = await installation.ctlJson('show', name);
    const { entries } = (await installation.ctlJson('audit', 'tail', '-n', '200')) as {
      entries: { vtpm?: string; action: string; verdict: string }[];
    };
    return entries.filter(({ vtpm }) => vtpm === id).map(({ action, verdict }) => `${action} ${verdict}`);
  }

  it('a TPM comes from a real swtpm and goes to another one, with all that a guest sees', async () => {
    const first = await swtpmOf();
    await useTpm(first.socket);
    const before = await seenBy(first.socket);
    const given = await vmm.save(first.control, 'from-swtpm');

    const door = await create('moved', '--state-blobs', 'plain');
    const control = controlOf(installation, 'moved');
    await vmm.load(control, given);
    assert.deepEqual(await seenBy(door), before);
    assert.deepEqual(await marksOf('moved'), ['rolled-back']);
    await withGuest(door, (guest) => guest.increment());

    const back = await vmm.save(control, 'to-swtpm');
    assert.deepEqual(await marksOf('moved'), ['rolled-back', 'plain-export']);
    const second = await swtpmOf();
    await vmm.load(second.control, back);
    assert.deepEqual(await seenBy(second.socket), { ...before, counter: before.counter + 1n });
    assert.deepEqual(await auditOf('moved'), ['load done', 'import done', 'export done']);
  });

  it('a reference brings the TPM back once, after its worker was stopped and started, and is nothing to swtpm', async () => {
    const { door, control, before } = await used('once');
    const files = await vmm.save(control, 'once');
    assert.equal(readFileSync(files.permanent).length, 144);
    assert.match(
      (await installation.ctl('show', 'once')).stdout,
      /^suspended +a reference to its state is out/m,
    );

    const other = await swtpmOf();
    await vmm.do(other.control, '--stop');
    assert.notEqual((await vmm.tryTo(other.control, '--load', 'permanent', files.permanent)).code, 0);

    await installation.ctlJson('stop', 'once');
    await installation.ctlJson('start', 'once');
    await vmm.load(control, files);
    assert.deepEqual(await seenBy(door), before);
    assert.doesNotMatch((await installation.ctl('show', 'once')).stdout, /^suspended/m);

    await vmm.do(control, '--stop');
    assert.notEqual((await vmm.tryTo(control, '--load', 'permanent', files.permanent)).code, 0);
    assert.notEqual((await vmm.tryTo(control, '-i')).code, 0, 'a power-on fails closed');
    await vmm.cycle(control);
    assert.deepEqual(await seenBy(door), { ...before, pcr: NO_PCR });
    assert.deepEqual(await marksOf('once'), []);
    assert.deepEqual(await auditOf('once'), ['load done', 'suspend done', 'load done', 'resume done']);
  });

  it('without the verbs nothing in the clear comes in, and nothing is changed', async () => {
    const swtpm = await swtpmOf();
    const given = await vmm.save(swtpm.control, 'refused');
    const { door, control, before } = await used('closed');
    await vmm.do(control, '--stop');
    assert.notEqual((await vmm.tryTo(control, '--load', 'permanent', given.permanent)).code, 0);
    assert.notEqual((await vmm.tryTo(control, '-i')).code, 0);
    await vmm.cycle(control);
    assert.deepEqual(await seenBy(door), { ...before, pcr: NO_PCR });
    assert.deepEqual(await marksOf('closed'), []);
  });

  it('a VMM that went on here has taken its reference back; one that went away, and comes anew, has not', async () => {
    const { door, control, before } = await used('vmm');
    const connect = async (): Promise<Vmm> => {
      const vmm = new Vmm(new TpmClient(createConnection({ path: control, allowHalfOpen: true })));
      assert.equal(await vmm.setDataFd(), 0);
      return vmm;
    };
    const take = async (vmm: Vmm): Promise<Buffer[]> => {
      const blobs = [await vmm.getBlob(1), await vmm.getBlob(2)];
      assert.equal(await vmm.getBlob(3), TPM_RETRY);
      return blobs.filter((blob) => Buffer.isBuffer(blob));
    };
    const bring = async (vmm: Vmm, blobs: readonly Buffer[]): Promise<number[]> => {
      assert.equal(await vmm.result('STOP'), 0);
      const results: number[] = [];
      for (const [index, blob] of blobs.entries()) results.push(await vmm.setBlob(index + 1, blob));
      return [...results, await vmm.result('INIT', u32(1))];
    };

    const first = await connect();
    const [lost, kept] = [await take(first), await first.data?.transmit(readClock())];
    assert.equal(kept && responseCode(kept), 0, 'the command runs when the reference is worthless');
    const again = await take(first);
    assert.equal(await first.result('LOCK_STORAGE', u32(1)), 0);
    const taken = await take(first);
    first.close();

    const second = await connect();
    const probe = await second.data?.transmit(readClock());
    assert.equal(probe && responseCode(probe), TPM_RC_FAILURE, 'QEMU asks before it powers the TPM on');
    for (const used of [lost, again]) {
      const results = await bring(second, used);
      assert.ok(
        results.every((result) => result !== 0),
        String(results),
      );
    }
    assert.deepEqual(await bring(second, taken), [0, 0, 0]);
    assert.deepEqual(await seenBy(door), before);
    second.close();
  });

  it('kill -9 of the worker between any two requests changes nothing', async () => {
    const { door, control, before } = await used('killed');
    const files = vmm.files('killed');
    for (const step of [...vmm.takingOut(control, files), ...vmm.bringingIn(control, files)]) {
      await step();
      const pid = await installation.workerPid('killed');
      process.kill(pid, 'SIGKILL');
      await until('another worker serves', async () => {
        const { body } = await installation.supervisord('GET', '/vtpms/killed');
        return body.state === 'running' && (body.worker as { pid: number } | null)?.pid !== pid;
      });
    }
    assert.deepEqual(await seenBy(door), before);
    await vmm.do(control, '--stop');
    assert.notEqual((await vmm.tryTo(control, '--load', 'permanent', files.permanent)).code, 0);
  });
});
