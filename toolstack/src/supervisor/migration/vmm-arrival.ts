import { setTimeout as delay } from 'node:timers/promises';
import { ToolstackError } from '../../error.js';
import type { VmmCall } from '../control-protocol.js';
import type { Visit } from '../doors.js';
import type { WorkerEnd } from '../worker-end.js';
import type { WorkerProcess } from '../worker-process.js';
import { giveIdentity, type Serving, type StartParts } from '../worker-start.js';
import { StandIn, type StandInParts } from './stand-in.js';

export interface VmmArrivalParts extends Omit<StandInParts, 'kind' | 'bufferSize' | 'called'> {
  readonly start: Omit<StartParts, 'vmm' | 'issue' | 'arrives'>;
  /** The ticket for a vTPM that the manager has not yet. */
  readonly issue: NonNullable<StartParts['issue']>;
  /** Whether the manager has it by now. @throws ToolstackError where it cannot be asked */
  hasArrived(): Promise<boolean>;
  /** It is here, and this worker serves it, and these connections. */
  serves(worker: WorkerProcess, serving: Serving, visits: readonly Visit[]): void;
}

const RETRY_MS = 200;

/** What the manager says where neither the vTPM, nor what its VMM brought, is refused. */
const PASSING: ReadonlySet<string> = new Set([
  ...['rate-limited', 'busy', 'deadline', 'shutting-down', 'locked', 'store-full', 'link-lost'],
]);

/**
 * A vTPM whose VMM brings it from another host. The VMM is served from the beginning, and with its INIT a worker loads the vTPM:
 * that is what makes this its host. Until then nothing has happened here.
 */
export class VmmArrival {
  readonly standIn: StandIn;
  readonly #parts: VmmArrivalParts;
  readonly #over = new AbortController();
  #loading: Promise<void> = Promise.resolve();

  constructor(parts: VmmArrivalParts) {
    this.#parts = parts;
    this.standIn = new StandIn({
      ...parts,
      ...{ kind: 'incoming', bufferSize: 0 },
      called: (call) => {
        this.#loading = this.#load(call);
        return this.#loading;
      },
    });
  }

  /** It does not come. Resolves when nothing of it can run any more. */
  async end(): Promise<void> {
    this.#over.abort();
    await this.standIn.end();
    await this.#loading.catch(() => undefined);
  }

  /** The ticket is signed now: its VM may have taken hours to come here. */
  async #load({ bufferSize, locality }: VmmCall): Promise<void> {
    const { start, issue, doors, log } = this.#parts;
    const { signal } = this.#over;
    const common = { ...start, vmm: { bufferSize, locality }, arrives: true };
    let claimed = this.standIn.take();
    for (let hasArrived = false; ; ) {
      const { worker } = claimed;
      const kill = (): void => void worker.kill();
      signal.addEventListener('abort', kill);
      const visits = doors.visits();
      let serving: Serving | undefined;
      try {
        serving = await giveIdentity(claimed, hasArrived ? common : { ...common, issue }, visits);
        if (signal.aborted) throw new ToolstackError('busy', 'it does not come any more');
      } catch (error) {
        const end = await worker.kill();
        if (signal.aborted) return;
        log.warn({ reason: (error as Error).message }, 'the vTPM is not here yet');
        hasArrived = (await this.#asOftenAsItTakes(() => this.#parts.hasArrived())) === true;
        if (signal.aborted) return;
        if (!hasArrived) {
          this.standIn.start(refusalOf(end));
          return;
        }
      } finally {
        signal.removeEventListener('abort', kill);
      }
      if (serving) {
        // Whatever fails behind that, this worker serves the vTPM.
        this.#parts.serves(worker, serving, visits);
        return;
      }
      await delay(RETRY_MS, undefined, { signal }).catch(() => undefined);
      const next = await this.#asOftenAsItTakes(() => this.#parts.claim(signal));
      if (signal.aborted) await next?.worker.kill();
      if (!next || signal.aborted) return;
      claimed = next;
    }
  }

  /** A manager that is away is waited for: only it knows, and no worker is without it. @returns undefined where it does not come */
  async #asOftenAsItTakes<T>(run: () => Promise<T>): Promise<T | undefined> {
    const { signal } = this.#over;
    while (!signal.aborted) {
      try {
        return await run();
      } catch {
        await delay(RETRY_MS, undefined, { signal }).catch(() => undefined);
      }
    }
    return undefined;
  }
}

/** Why the manager refused the Load; undefined where the next one need not be. */
function refusalOf({ failure }: WorkerEnd): string | undefined {
  return failure && !PASSING.has(failure.reason) ? `${failure.reason}: ${failure.message}` : undefined;
}
