import { Socket } from 'node:net';
import { setImmediate as turn } from 'node:timers/promises';
import { socketPair } from 'vtpm-common/libc';
import { boxKeyPair, type Verb } from 'vtpm-proto';
import { AnswerPipe } from 'vtpmd/checkpoint/answer-pipe';
import type { Left } from 'vtpmd/checkpoint/left';
import { CheckpointMemory } from 'vtpmd/checkpoint/memory';
import type { VtpmdError } from 'vtpmd/error';
import { readIdentity } from 'vtpmd/manager-link/load';
import { LoadKeys } from 'vtpmd/manager-link/load-keys';
import { type ManagerLink, openManagerLink } from 'vtpmd/manager-link/manager-link';
import type { StateBlobType } from 'vtpmd/state-blob/state-blobs';
import { HOLD_MS } from 'vtpmd/worker/outage-policy';
import { arrive, beginRun, goOn } from 'vtpmd/worker/power';
import { loadTpm, type ServedTpm } from 'vtpmd/worker/served-tpm';
import type { MiniManager } from './mini-manager.js';
import { KeptRun } from './worker-process.js';

/** How long a VM stands still here for a manager that is away. */
const POWER_HOLD_MS = 50;

/** Both halves of what a VMM takes out. */
export interface Halves {
  readonly permanent: Buffer;
  readonly volatile: Buffer;
}

export interface StartOptions {
  readonly verbs?: readonly Verb[];
  /** Of a worker before this one, which goes on; otherwise a new one. */
  readonly run?: KeptRun;
  readonly power?: 'on' | 'vmm';
}

/** A worker without its process, so that a test can be its VMM before there is a door. One at a time: libtpms has globals. */
export class BlobWorker {
  /** What it must not go on after. */
  readonly failures: unknown[] = [];
  #tpm!: ServedTpm;

  private constructor(
    readonly manager: MiniManager,
    readonly run: KeptRun,
  ) {}

  static async start(manager: MiniManager, options: StartOptions = {}): Promise<BlobWorker> {
    const { run = new KeptRun(), verbs, power = 'vmm' } = options;
    const worker = new BlobWorker(manager, run);
    const start: Verb[] = manager.saves.length === 0 ? ['MANUFACTURE'] : ['COLD', 'RESUME'];
    await worker.#load([...start, ...(verbs ?? [])], options.run !== undefined, power);
    return worker;
  }

  get tpm(): ServedTpm {
    return this.#tpm;
  }

  /** A command that comes in at a door. */
  send(command: Buffer, kind: 'tpm' | 'vmm-data' = 'tpm'): Promise<Buffer> {
    return new Promise((resolve, reject) => {
      this.#tpm.queue.submit({
        ...{ command, kind, isGone: false },
        answer: (response) => resolve(Buffer.from(response)),
        dropped: () => reject(new Error('dropped')),
      });
    });
  }

  /** CMD_INIT. */
  async init(): Promise<void> {
    await this.#tpm.power.on();
  }

  /** CMD_STOP. */
  async stop(): Promise<void> {
    await this.#tpm.power.off();
    this.#tpm.blobs.stopped();
  }

  /** CMD_GET_STATEBLOB. */
  async get(type: StateBlobType): Promise<Buffer | undefined> {
    let blob: Buffer | undefined;
    await this.#tpm.power.perform({
      run: async () => {
        blob = await this.#tpm.blobs.takeOut(type);
        return undefined;
      },
    });
    return blob;
  }

  async takeOut(): Promise<Halves> {
    const permanent = await this.get('permanent');
    const volatile = await this.get('volatile');
    if (!permanent || !volatile) throw new Error('there is nothing to take out');
    return { permanent, volatile };
  }

  /** CMD_SET_STATEBLOB of both halves, where the TPM is off. */
  bringIn({ permanent, volatile }: Halves): void {
    this.#tpm.blobs.bringIn('permanent', Buffer.from(permanent));
    this.#tpm.blobs.bringIn('volatile', Buffer.from(volatile));
  }

  /** A new link, after the manager was away. */
  relink(): void {
    this.#tpm.session.attach(this.#openLink());
  }

  #openLink(): ManagerLink {
    const [here, there] = socketPair();
    this.manager.accept(new Socket({ fd: here }));
    return openManagerLink(new Socket({ fd: there }));
  }

  /** As kill -9: what is durable, or in the memory of the run, is left. */
  async kill(): Promise<void> {
    // This may be called from what a link is being told: node:http2 does not bear the end of it then.
    await turn();
    this.#tpm.queue.kill();
    this.#tpm.session.close();
    this.#tpm.engine.terminate();
  }

  /** The worker and its run. */
  async end(): Promise<void> {
    await this.kill();
    this.run.close();
  }

  async #load(verbs: Verb[], goesOn: boolean, power: 'on' | 'vmm'): Promise<void> {
    const link = this.#openLink();
    const keys = new LoadKeys(boxKeyPair());
    const publicKey = Buffer.from(keys.publicKey).toString('hex');
    const identity = readIdentity({
      ...this.manager.identity(publicKey, 'clear', verbs, this.run.vmRunId),
      power,
    });
    const memory = CheckpointMemory.map(this.run.memory);
    const left: Left = {
      memory,
      pipe: new AnswerPipe(memory.marks, this.run.pipe),
      controlPipe: undefined,
      keeps: true,
      resumes: goesOn ? { newest: this.run.newest(), connections: 0 } : undefined,
    };
    const parts = { identity, holdTimes: { ...HOLD_MS, power: POWER_HOLD_MS }, left };
    const { tpm, chosen, hasArrived } = await loadTpm(link, keys, parts, {
      linkUp: () => undefined,
      linkLost: (_error: VtpmdError) => undefined,
      failed: (error) => this.failures.push(error),
      dataChannel: () => undefined,
      vmmChanged: () => undefined,
      vmmShutDown: () => undefined,
      log: () => undefined,
    });
    this.#tpm = tpm;
    if (chosen) await goOn(tpm, chosen, [], left, () => undefined);
    else if (hasArrived) await arrive(tpm);
    else await beginRun(tpm, identity);
  }
}
