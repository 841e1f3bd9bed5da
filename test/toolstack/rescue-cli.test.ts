import assert from 'node:assert/strict';
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseFencingText, verifyFencing } from 'vtpm-proto';
import { Desk, supervisorVtpm } from './cli-fixture.js';

const ID = '11111111-0000-4000-8000-000000000000';
const OTHER = '22222222-0000-4000-8000-000000000000';
const HOST = 'cd'.repeat(32);

describe('vtpmctl migrate fence and rescue', () => {
  let desk: Desk;
  beforeEach(() => {
    desk = new Desk();
    mkdirSync(desk.paths.toolstack.directory, { recursive: true });
    writeFileSync(desk.paths.toolstack.key, Buffer.alloc(32, 1), { mode: 0o600 });
  });
  afterEach(() => desk.clear());

  const facts = ['--vtpm', ID, '--last-generation', '41', '--method', 'its power was cut'];

  it('fence signs what the operator says, for a host id or the name of a peer', async () => {
    await desk.manager({ 'GET /peers': { body: { peers: [{ name: 'hosta', hostId: HOST }] } } });
    for (const host of ['hosta', HOST]) {
      const { code, stdout, stderr } = await desk.ctl(['migrate', 'fence', '--host', host, ...facts]);
      assert.equal(code, 0, stderr);
      assert.match(stderr, /does not run vTPM 1{8}-.* and will not \(its power was cut\)/);
      const statement = verifyFencing(parseFencingText(stdout));
      assert.equal(Buffer.from(statement.host).toString('hex'), HOST);
      assert.equal(statement.lastGeneration, 41n);
      assert.equal(statement.method, 'its power was cut');
      assert.ok(Math.abs(Number(statement.at) - Date.now()) < 60_000);
    }
    const nobody = await desk.ctl(['migrate', 'fence', '--host', 'hostz', ...facts]);
    assert.equal(nobody.code, 1);
    assert.match(nobody.stderr, /"hostz" is neither/);
  });

  it('rescue does nothing without a statement, whatever other flags there are', async () => {
    const supervisor = await desk.supervisor({ 'GET /vtpms': { body: { vtpms: [] } } });
    const manager = await desk.manager({ 'GET /health': { body: { status: 'ready' } } });
    const flags = ['--from-backup', '/x', '--operator-key', '/y', '--accept-rollback'];
    const without = await desk.ctl(['--json', 'migrate', 'rescue', 'web1', ...flags]);
    assert.equal(without.code, 1);
    assert.equal((JSON.parse(without.stderr) as { error: { code: string } }).error.code, 'not-fenced');
    const forged = join(desk.directory, 'forged');
    writeFileSync(forged, 'vtpm-fencing-1-AAAA\n');
    const wrong = await desk.ctl(['migrate', 'rescue', 'web1', ...flags, '--fencing', forged]);
    assert.equal(wrong.code, 1);
    assert.match(wrong.stderr, /--fencing: /);
    assert.deepEqual([...supervisor.calls, ...manager.calls], []);
  });

  it('rescue does not take the name of another vTPM', async () => {
    await desk.supervisor({ 'GET /vtpms': { body: { vtpms: [supervisorVtpm(OTHER, 'web1')] } } });
    await desk.manager({ 'GET /health': { body: { status: 'ready' } } });
    const { stdout } = await desk.ctl(['migrate', 'fence', '--host', HOST, ...facts]);
    const fencing = join(desk.directory, 'web1.fencing');
    writeFileSync(fencing, stdout);
    const { code, stderr } = await desk.ctl([
      ...['migrate', 'rescue', 'web1', '--from-backup', '/x', '--operator-key', '/y'],
      ...['--fencing', fencing, '--accept-rollback'],
    ]);
    assert.equal(code, 1);
    assert.match(stderr, /web1 is another vTPM: 2{8}-/);
  });
});
