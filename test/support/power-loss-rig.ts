import assert from 'node:assert/strict';
import { randomInt } from 'node:crypto';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { readNext } from 'vtpm-manager/enrolment';
import { type Moment, readTrace, tracedTo } from './disk-trace.js';
import { LOSSES, LossyDisk } from './lossy-disk.js';
import { ManagerLedger, readManager } from './manager-ledger.js';
import { ManagerLoad } from './manager-load.js';
import { ManagerInstallation } from './manager-process.js';
import { type Swtpm, startSwtpm } from './swtpm.js';
import { until } from './until.js';

/** A write to one of the two disks. */
interface Step {
  readonly moment: Moment;
  readonly disk: 'home' | 'tpm';
}

/**
 * A manager at work, recorded write by write, and then started again and again from disks as a loss of power at some
 * moment may have left them. The chip keeps what it has answered, so its disk is at each moment as it was then.
 */
export class PowerLossRig {
  private constructor(
    private readonly manager: ManagerInstallation,
    private readonly tpm: Swtpm,
    private readonly load: ManagerLoad,
    private readonly home: LossyDisk,
    private readonly chip: LossyDisk,
    private readonly steps: readonly Step[],
  ) {}

  /** Records `rounds` of everything that is asked of a manager, a rotation in each. */
  static async record(rounds: number): Promise<PowerLossRig> {
    const traces = mkdtempSync(join(tmpdir(), 'vtpm-trace-'));
    const managerTrace = join(traces, 'manager');
    const tpmTrace = join(traces, 'tpm');
    const manager = new ManagerInstallation();
    const plain = await startSwtpm();
    const { managerId } = await manager.init(`unix:${plain.socket}`);
    const load = new ManagerLoad(manager, String(managerId), new ManagerLedger());
    await manager.start();
    await load.allowWorkers();
    await load.resume();
    // Leaves something to retire.
    await load.round({ saves: 3, rotates: false });
    load.disconnect();
    await manager.stop();
    await plain.kill();
    const home = new LossyDisk(manager.paths.directory);
    const chip = new LossyDisk(plain.directory);
    await plain.restart(tracedTo(tpmTrace));
    await manager.start({
      args: ['--no-store-sandbox', '--anchor-window', '1'],
      under: tracedTo(managerTrace),
    });
    await load.settle();
    await load.resume();
    for (let round = 0; round < rounds; round++) await load.round({ saves: 9, rotates: true });
    await manager.stop('SIGKILL');
    load.disconnect();
    await plain.kill();
    const [written, counted] = await Promise.all([
      readTrace(managerTrace, manager.paths.directory),
      readTrace(tpmTrace, plain.directory),
    ]);
    rmSync(traces, { recursive: true });
    const steps = [
      ...written.map((moment): Step => ({ moment, disk: 'home' })),
      ...counted.map((moment): Step => ({ moment, disk: 'tpm' })),
    ].sort((a, b) => a.moment.at - b.moment.at);
    return new PowerLossRig(manager, plain, load, home, chip, steps);
  }

  /** Cuts the power at `cuts` random moments in one pass, and starts what is left each time. */
  async cutPower(cuts: number): Promise<void> {
    const dirty = this.#chooseCuts(cuts);
    for (const [i, { moment, disk }] of this.steps.entries()) {
      (disk === 'home' ? this.home : this.chip).apply(moment);
      for (let image = dirty.get(i) ?? 0; image > 0; image--) {
        const next = this.steps[i + 1]?.moment.at ?? moment.at;
        await this.#startImage(i, next);
      }
    }
  }

  async destroy(): Promise<void> {
    this.load.disconnect();
    await this.manager.remove();
    await this.tpm.stop();
  }

  /** @returns how many images there are to be after a step */
  #chooseCuts(cuts: number): Map<number, number> {
    const chosen = new Map<number, number>();
    for (let cut = 0; cut < cuts; cut++) {
      const at = randomInt(this.steps.length);
      chosen.set(at, (chosen.get(at) ?? 0) + 1);
    }
    return chosen;
  }

  async #startImage(step: number, at: number): Promise<void> {
    const loss = LOSSES[randomInt(LOSSES.length)] ?? 'nothing';
    const where = `power lost after write ${step} of ${this.steps.length}, lost of what was not synced: ${loss}`;
    await this.tpm.kill();
    this.chip.writeImage('nothing');
    this.home.writeImage(loss);
    await this.tpm.restart();
    try {
      await this.manager.start({ args: ['--no-store-sandbox'] });
      const shown = await readManager(this.manager);
      this.load.ledger.check(shown, at);
      await this.load.examine(shown.vtpms);
      await until('no rotation is under way', () => readNext(this.manager.paths) === undefined);
    } catch (cause) {
      assert.fail(`${where}: ${(cause as Error).message}`);
    } finally {
      this.load.disconnect();
      await this.manager.stop('SIGKILL');
    }
  }
}
