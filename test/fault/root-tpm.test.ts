import assert from 'node:assert/strict';
import { cpSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type FaultyTpm, startFaultyTpm } from '../support/faulty-tpm.js';
import { ManagerInstallation } from '../support/manager-process.js';
import { type Swtpm, startSwtpm } from '../support/swtpm.js';
import { until } from '../support/until.js';
import { testVtpm } from '../support/worker-client.js';

// TPM 2.0 part 2, table 12 and table 16.
const UNSEAL = 0x15e;
const NV_RATE = 0x920;
const LOCKOUT = 0x921;
const RETRY = 0x922;

describe('I-10 a root TPM that misbehaves', () => {
  let chip: Swtpm;
  let bus: FaultyTpm;
  let manager: ManagerInstallation;
  let managerId: string;

  before(async () => {
    chip = await startSwtpm();
    bus = await startFaultyTpm(chip.socket);
    manager = new ManagerInstallation();
    managerId = String((await manager.init(`unix:${bus.path}`)).managerId);
    writeFileSync(join(manager.home, 'config.json'), '{"tpm-deadline": 1}');
  });
  beforeEach(() => {
    bus.fault = () => undefined;
    bus.forget();
  });
  afterEach(() => manager.stop());
  after(async () => {
    await manager.remove();
    await bus.close();
    await chip.stop();
  });

  /** Positive control of every row: without the fault the same start works. */
  async function startsWithout(): Promise<void> {
    bus.fault = () => undefined;
    assert.equal((await manager.start()).status, 'ready');
  }

  async function refusedAs(code: string): Promise<void> {
    await assert.rejects(manager.start(), (error: Error) => {
      assert.match(error.message, new RegExp(`ended with 1: .*\\(${code}\\)`, 's'));
      return true;
    });
  }

  for (const [name, code] of Object.entries({ RETRY, NV_RATE })) {
    it(`I-10 ${name}: asked again until it works`, async () => {
      bus.fault = (_, count) => (count <= 2 ? code : undefined);
      assert.equal((await manager.start()).status, 'ready');
      assert.ok(bus.times(UNSEAL) >= 3, 'the command was sent again');
      await manager.stop();
      bus.forget();
      await startsWithout();
      assert.equal(bus.times(UNSEAL), 1, 'positive control: without the fault it is sent once');
    });

    it(`I-10 ${name} without end: tpm-busy, after a bounded number of times`, async () => {
      bus.fault = (command) => (command === UNSEAL ? code : undefined);
      await refusedAs('tpm-busy');
      assert.ok(bus.times(UNSEAL) > 1 && bus.times(UNSEAL) < 50, `${bus.times(UNSEAL)} times`);
      await startsWithout();
    });
  }

  it('I-10 LOCKOUT: tpm-lockout, and never asked again', async () => {
    bus.fault = (command) => (command === UNSEAL ? LOCKOUT : undefined);
    await refusedAs('tpm-lockout');
    assert.equal(bus.times(UNSEAL), 1);
    await startsWithout();
  });

  it('I-10 silence, from the first command or in the middle: tpm-unreachable', async () => {
    bus.fault = () => 'silence';
    await refusedAs('tpm-unreachable');
    bus.fault = (command) => (command === UNSEAL ? 'silence' : undefined);
    await refusedAs('tpm-unreachable');
    await startsWithout();
  });

  it('I-10 a TPM that goes away is not missed by the vTPMs that there are, and only waited for by a new one', async () => {
    await startsWithout();
    const image = { digest: manager.toolstack.imageDigest.toString('hex'), note: 'test' };
    await manager.admin('POST', '/images', image);
    const vtpm = testVtpm();
    const first = manager.worker(managerId);
    const running = await first.session(
      vtpm,
      await first.load(manager.toolstack.ticket(first.managerId, vtpm, first.keys.publicKey)),
    );
    await running.save({ permanent: Buffer.from('P1') });

    bus.fault = () => 'silence';
    await chip.kill();
    try {
      assert.equal((await running.save({ permanent: Buffer.from('P2') })).generation, 2n);
      // A new vTPM loads, and begins to exist when the TPM has counted its first save.
      const second = manager.worker(managerId);
      const other = testVtpm();
      const grant = await second.load(
        manager.toolstack.ticket(second.managerId, other, second.keys.publicKey),
      );
      const session = await second.session(other, grant);
      let isAcknowledged = false;
      const saved = session.save({ permanent: Buffer.from('Q1') }).then((ack) => {
        isAcknowledged = true;
        return ack;
      });
      await until('the manager misses the TPM', () => /counter cannot be advanced/.test(manager.stderr));
      assert.equal((await running.save({ permanent: Buffer.from('P3') })).generation, 3n);
      assert.equal((await manager.admin('GET', '/health')).body.status, 'ready');
      assert.equal(isAcknowledged, false);
      bus.fault = () => undefined;
      await chip.restart();
      assert.equal((await saved).generation, 1n);
      second.close();
      await chip.kill();
      // Positive control: the TPM is gone indeed, and the next start needs it.
      await manager.stop();
      await refusedAs('tpm-unreachable');
    } finally {
      first.close();
      await chip.restart();
    }
    await startsWithout();
    assert.equal((await manager.admin('GET', '/health')).body.vtpms, 2);
  });

  it('I-9 I-10 a TPM that was emptied, and one whose SRK was replaced: refused by name', async () => {
    const aside = mkdtempSync(join(tmpdir(), 'vtpm-aside-'));
    const other = new ManagerInstallation();
    const state = () => readdirSync(chip.directory).filter((name) => name.includes('permall'));
    try {
      await chip.kill();
      for (const name of state()) cpSync(join(chip.directory, name), join(aside, name));
      for (const name of state()) rmSync(join(chip.directory, name));
      await chip.restart();
      await refusedAs('tpm-emptied');
      // Another installation sets the empty TPM up: at the same handle is another SRK now.
      await other.init(`unix:${chip.socket}`);
      await refusedAs('tpm-changed');
      assert.equal((await other.start()).status, 'ready', 'the neighbour on the same TPM is served');
      await other.stop();
    } finally {
      await other.remove();
      await chip.kill();
      for (const name of readdirSync(aside)) cpSync(join(aside, name), join(chip.directory, name));
      rmSync(aside, { recursive: true });
      await chip.restart();
    }
    await startsWithout();
  });
});
