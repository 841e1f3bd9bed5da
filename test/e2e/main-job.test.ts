import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { readdirSync, readFileSync, statSync } from 'node:fs';
import { join } from 'node:path';
import {
  Alg,
  embed,
  NV_DefineSpace,
  NV_Write,
  NvAttribute,
  permanent,
  Rh,
  readNvIndex,
  tpmsNvPublic,
  withPassword,
} from 'tpm2-ts-bindings';
import { connectGuest, type Guest } from 'vtpm-quickstart/guest';
import { Installation } from '../support/installation.js';
import { startSwtpm } from '../support/swtpm.js';
import { until } from '../support/until.js';

describe('the main job', () => {
  let installation: Installation;
  before(async () => {
    installation = await Installation.create();
    await installation.start();
  });
  after(() => installation?.destroy());

  it('keeps a vTPM over stop and start, with a new VM run and without climbing lockout counters', async () => {
    const guest = await connectGuest(await installation.vtpm('web1'));
    await guest.defineCounter();
    const before = [await guest.counter(), await guest.makeKey(), await guest.endorsement()];
    await guest.extend(16, 'measured');
    await guest.close();
    const first = await installation.ctlJson('show', 'web1');
    await installation.ctlJson('stop', 'web1');
    await installation.ctlJson('start', 'web1');
    const again = await connectGuest(installation.door('web1'));
    assert.deepEqual(
      [await again.counter(), await again.keyFingerprint(), await again.endorsement()],
      before,
    );
    assert.equal(await again.pcr(16), '0'.repeat(64), 'a new VM run starts with fresh PCRs');
    await again.close();
    const second = await installation.ctlJson('show', 'web1');
    assert.equal(second.epoch, (first.epoch as number) + 1);
    assert.ok((second.generation as number) > (first.generation as number));
  });

  it('shows what scripts need', async () => {
    const shown = await installation.ctlJson('show', 'web1');
    const worker = shown.worker as Record<string, unknown>;
    const sockets = shown.sockets as Record<string, unknown>;
    assert.match(String(shown.id), /^[0-9a-f-]{36}$/);
    assert.equal(shown.name, 'web1');
    assert.equal(shown.state, 'running');
    assert.equal(typeof worker.pid, 'number');
    assert.equal(worker.isolation, 'sandbox');
    assert.ok((worker.layers as string[]).length > 3);
    assert.equal(sockets.tpm, installation.door('web1'));
    assert.equal(sockets.tcti, installation.door('web1', 'tcti'));
    assert.deepEqual([sockets.control, sockets.ring], [null, null]);
    assert.ok((shown.savedBytes as number) > 1000);
    assert.ok(Date.parse(String(shown.savedAt)) > 0);
  });

  it('gives every vTPM an endorsement seed of its own', async () => {
    const guests = await Promise.all(
      ['web1', 'web2'].map(async (name) =>
        connectGuest(name === 'web1' ? installation.door(name) : await installation.vtpm(name)),
      ),
    );
    const [first, second] = await Promise.all(guests.map((guest) => guest.endorsement()));
    assert.notEqual(first, second);
    await Promise.all(guests.map((guest) => guest.close()));
  });

  it('serves several guests of one vTPM in turn', async () => {
    const guests = await Promise.all(
      Array.from({ length: 4 }, () => connectGuest(installation.door('web1'))),
    );
    const before = await guests[0]!.counter();
    await Promise.all(guests.flatMap((guest) => Array.from({ length: 5 }, () => guest.increment())));
    assert.equal(await guests[0]!.counter(), before + 20n);
    await Promise.all(guests.map((guest) => guest.close()));
  });

  it('I-7 no guest secret is on disk in the clear', async () => {
    const marker = randomBytes(64);
    const guest = await connectGuest(installation.door('web1'));
    await writeNv(guest, marker);
    await guest.close();
    assert.equal(filesWith(installation.home, marker).length, 0);
    assert.equal(filesWith(installation.home, Buffer.from(marker.toString('hex'))).length, 0);
    assert.equal(filesWith(installation.home, Buffer.from(marker.toString('base64'))).length, 0);
  });

  it('I-7 (positive control) the same search finds it where a software TPM keeps its state in the clear', async () => {
    const swtpm = await startSwtpm();
    const marker = randomBytes(64);
    const guest = await connectGuest(swtpm.socket);
    await writeNv(guest, marker);
    await guest.close();
    assert.equal(filesWith(swtpm.directory, marker).length, 1);
    await swtpm.stop();
  });

  it('a manager restart is a pause to running guests, nothing more', async () => {
    const guest = await connectGuest(installation.door('web1'));
    const before = await guest.counter();
    await installation.killManager();
    const steps = Promise.all(Array.from({ length: 3 }, () => guest.increment()));
    await installation.startManager();
    await steps;
    assert.equal(await guest.counter(), before + 3n);
    await guest.close();
  });

  it('starts what has autostart by itself when the supervisor comes back', async () => {
    await installation.ctlJson('create', 'auto1', '--autostart');
    await installation.killSupervisor();
    await installation.startSupervisor();
    await until(
      'auto1 runs',
      async () => (await installation.supervisord('GET', '/vtpms/auto1')).body.state === 'running',
    );
    const others = await installation.supervisord('GET', '/vtpms/web1');
    assert.equal(others.body.state, 'crashed', 'checkpoints end with their supervisor');
    await installation.ctlJson('start', 'web1');
  });

  it('deletes for good: the id is retired and the name is free', async () => {
    const { id } = await installation.ctlJson('show', 'web2');
    await installation.ctlJson('delete', 'web2', '--yes');
    const record = await installation.admin('GET', `/vtpms/${id}`);
    assert.equal(record.body.kind, 'retired');
    const guest = await connectGuest(await installation.vtpm('web2'));
    assert.notEqual((await installation.ctlJson('show', 'web2')).id, id);
    await guest.close();
  });

  it('two installations run side by side', async () => {
    const other = await Installation.create();
    await other.start();
    const guest = await connectGuest(await other.vtpm('web1'));
    const neighbour = await connectGuest(installation.door('web1'));
    assert.notEqual(await guest.endorsement(), await neighbour.endorsement());
    await Promise.all([guest.close(), neighbour.close()]);
    await other.destroy();
  });
});

const MARKER_INDEX = 0x01500099;

async function writeNv({ tpm }: Guest, data: Buffer): Promise<void> {
  const owner = withPassword(permanent(Rh.OWNER));
  const nvPublic = {
    nvIndex: MARKER_INDEX,
    nameAlg: Alg.SHA256,
    attributes: NvAttribute.OWNERWRITE | NvAttribute.OWNERREAD | NvAttribute.NO_DA,
    authPolicy: Buffer.alloc(0),
    dataSize: data.length,
  };
  await tpm.run(
    NV_DefineSpace,
    { authHandle: owner },
    { auth: Buffer.alloc(0), publicInfo: embed(tpmsNvPublic, nvPublic) },
  );
  const nvIndex = await readNvIndex(tpm, MARKER_INDEX);
  await tpm.run(NV_Write, { authHandle: owner, nvIndex: nvIndex! }, { data, offset: 0 });
}

function filesWith(directory: string, bytes: Buffer): string[] {
  return readdirSync(directory, { recursive: true, encoding: 'utf8' })
    .map((name) => join(directory, name))
    .filter((path) => statSync(path).isFile() && readFileSync(path).includes(bytes));
}
