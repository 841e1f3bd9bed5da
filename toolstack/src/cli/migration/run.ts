import { ToolstackError } from '../../error.js';
import type { SupervisorApi, SupervisorVtpm } from '../supervisor-api.js';
import { isLast, type MigrateProgress } from './progress.js';

/** What a migration under way can be told, and what it says of that. */
export class RunningMigration {
  readonly #left = new AbortController();
  #last: MigrateProgress | undefined;
  #isCancelWanted = false;
  #isAnswered = false;

  /** @param say gets a sentence for who asked to cancel */
  constructor(
    private readonly supervisor: SupervisorApi,
    private readonly vtpm: Pick<SupervisorVtpm, 'id' | 'name'>,
    private readonly say: (text: string) => void,
  ) {}

  /**
   * @param isDryRun it ends with PREPARED
   * @returns what it came to
   * @throws ToolstackError of who refused it, `in-doubt` where the supervisor broke off before it said the end
   */
  async run(
    order: Uint8Array,
    isDryRun: boolean,
    show: (progress: MigrateProgress) => void,
  ): Promise<MigrateProgress> {
    const { id, name } = this.vtpm;
    try {
      await this.supervisor.migrate(id, order, this.#left.signal, (progress) => {
        this.#last = progress;
        show(progress);
        // It had not begun when it was asked the first time.
        if (this.#isCancelWanted && !this.#isAnswered) void this.#cancel();
      });
    } catch (caught) {
      if (!this.#last) throw caught;
      throw this.#brokenOff(ToolstackError.from(caught));
    }
    const last = this.#last;
    if (last && (isLast(last) || (isDryRun && last.phase === 'PREPARED'))) return last;
    throw this.#brokenOff(
      new ToolstackError('internal', `the supervisor did not say what came of ${name}; see vtpmctl logs`),
    );
  }

  /** The first time it is asked for it is cancelled where that is still possible; the second time nobody waits any more. */
  interrupt(): void {
    if (this.#isCancelWanted) this.#left.abort();
    else this.cancel();
  }

  cancel(): void {
    this.#isCancelWanted = true;
    void this.#cancel();
  }

  async #cancel(): Promise<void> {
    const { id, name } = this.vtpm;
    try {
      const isCancelled = await this.supervisor.cancelMigration(id);
      this.#isAnswered = true;
      this.say(
        isCancelled
          ? `cancelling: ${name} stays here`
          : `too late to cancel: the state of ${name} is on its way, and only the other host can say whether it took it. ` +
              'Waiting for that; interrupt once more to leave, it goes on without vtpmctl',
      );
    } catch (caught) {
      const error = ToolstackError.from(caught);
      if (error.code !== 'unknown-migration') this.say(`not cancelled: ${error.message}`);
    }
  }

  #brokenOff(cause: ToolstackError): ToolstackError {
    const { name } = this.vtpm;
    const why = this.#left.signal.aborted ? 'nobody waits for it any more' : cause.message;
    return new ToolstackError(
      'in-doubt',
      `what came of ${name} is not known here (${why}); see it with: vtpmctl migrate status ${name}`,
      { cause },
    );
  }
}
