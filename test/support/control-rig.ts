import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { MiniManager } from './mini-manager.js';
import { Vmm } from './vmm.js';
import { type KeptGuest, KeptRun, makeKept, WorkerProcess } from './worker-process.js';

/** Where a worker that does what a VMM asks may be killed: every point at which something else is known outside of it. */
const EVERYWHERE = [
  'control-before-act',
  'control-after-act',
  'step-saved',
  'control-before-answer',
  'before-start-save',
  'after-start-save',
  'half-checkpoint',
  'before-pipe',
  'after-pipe',
  'before-consume',
  'after-consume',
  'after-send',
];

/** Of a TPM that leaves as a reference, and of one that leaves in the clear. */
export const CONTROL_BARRIERS = {
  reference: [...EVERYWHERE, 'before-suspend', 'after-suspend', 'after-take-back'],
  plain: [...EVERYWHERE, 'before-export', 'after-export'],
} as const;
export type BlobMode = keyof typeof CONTROL_BARRIERS;

/** Each life of a worker ends at a barrier of its choice, the so-many-th time it comes there. */
function endsAnywhere(barriers: readonly string[], longest: number): string {
  return `const barriers = ${JSON.stringify(barriers)};
const at = barriers[Math.floor(Math.random() * barriers.length)];
let left = 1 + Math.floor(Math.random() * ${longest});
globalThis[Symbol.for('vtpm.barrier')] = (name) => {
  if (name !== at || --left > 0) return;
  require('node:fs').writeSync(2, 'killed at ' + name + '\\n');
  try { process.kill(process.pid, 'SIGKILL'); } catch { process.abort(); }
};`;
}

/** A VMM whose TPM's workers end again and again; each is followed by another one, with the same connections. */
export class ControlRig {
  readonly manager = new MiniManager();
  readonly run = new KeptRun('vmm');
  readonly vmm: Vmm;
  readonly tcti: KeptGuest;
  readonly #control: KeptGuest;
  readonly #directory = mkdtempSync(join(tmpdir(), 'vtpm-control-'));
  readonly #prelude: string;
  readonly #logs: string[] = [];
  #worker: WorkerProcess;
  #isOver = false;
  #failure: Error | undefined;
  #next: Promise<void> = Promise.resolve();

  /** The first worker serves, and is not killed before. @param longest times that a life comes to its barrier */
  static async create(mode: BlobMode, longest = 4): Promise<ControlRig> {
    const rig = new ControlRig(mode, longest);
    await rig.#worker.begin(rig.run, 'none');
    rig.#watch();
    rig.#connect();
    return rig;
  }

  private constructor(
    readonly mode: BlobMode,
    longest: number,
  ) {
    this.run.startup = 'none';
    if (mode === 'plain') this.run.verbs = ['EXPORT', 'IMPORT'];
    this.#prelude = join(this.#directory, 'prelude.cjs');
    writeFileSync(this.#prelude, endsAnywhere(CONTROL_BARRIERS[mode], longest));
    this.#worker = new WorkerProcess(this.manager);
    const [control, tcti] = [makeKept(this.run, 'control'), makeKept(this.run, 'tcti')];
    this.#control = control;
    this.tcti = tcti;
    this.vmm = new Vmm(control.client);
  }

  /** How often workers ended at each barrier. */
  get endings(): ReadonlyMap<string, number> {
    const endings = new Map<string, number>();
    for (const log of [...this.#logs, this.#worker.log]) {
      for (const [, name = ''] of log.matchAll(/killed at ([a-z-]+)/g)) {
        endings.set(name, (endings.get(name) ?? 0) + 1);
      }
    }
    return endings;
  }

  get kills(): number {
    return [...this.endings.values()].reduce((sum, count) => sum + count, 0);
  }

  /** What the VMM does; fails where no worker goes on. */
  async while<T>(doing: Promise<T>): Promise<T> {
    let timer: NodeJS.Timeout | undefined;
    const failed = new Promise<never>((_, reject) => {
      timer = setInterval(() => {
        if (this.#failure) reject(this.#failure);
      }, 50);
    });
    try {
      return await Promise.race([doing, failed]);
    } finally {
      clearInterval(timer);
    }
  }

  async destroy(): Promise<void> {
    this.#isOver = true;
    this.vmm.close();
    this.tcti.client.close();
    await this.#next;
    await this.#worker.kill();
    this.manager.stop();
    this.run.close();
    rmSync(this.#directory, { recursive: true, force: true });
  }

  /** kill -9, at a moment between requests. Those that follow the first one end by themselves. */
  async killNow(): Promise<void> {
    await this.#worker.kill();
  }

  #connect(): void {
    this.#worker.passKept([this.#control, this.tcti]);
  }

  #watch(): void {
    const worker = this.#worker;
    void worker.exited.then(() => {
      this.#next = this.#goOn(worker).catch((error: unknown) => {
        this.#failure = error as Error;
      });
    });
  }

  async #goOn(ended: WorkerProcess): Promise<void> {
    this.#logs.push(ended.log);
    await ended.kill();
    if (this.#isOver) return;
    const worker = new WorkerProcess(this.manager, { nodeArguments: ['--require', this.#prelude] });
    this.#worker = worker;
    this.#watch();
    // One that ends before it serves is followed like any other.
    const said = await Promise.race([worker.goOn(this.run, [this.#control, this.tcti]), worker.exited]);
    if ('type' in said && said.type === 'failed') {
      this.#failure = new Error(`no worker goes on: ${String(said.message)}\n${worker.log}`);
    }
  }
}
