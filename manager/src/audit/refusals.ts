import type { AuditLog } from './audit-log.js';
import type { AuditEvent } from './entry.js';

const WINDOW_MS = 60_000;
/** Different refusals that are told apart at a time. */
const MAX_TOLD_APART = 256;

interface Repeated {
  readonly event: AuditEvent;
  /** Since the last entry. */
  times: number;
}

/**
 * Refusals in the audit log, so that who is refused again and again does not fill the disk: the first of a kind is
 * written at once, those that follow within a minute as one entry with their number. A kind is action, vTPM and reason.
 * What does not fit is counted in one kind for all.
 */
export class Refusals {
  readonly #kinds = new Map<string, Repeated>();
  #timer: NodeJS.Timeout | undefined;

  constructor(
    private readonly audit: Pick<AuditLog, 'append'>,
    private readonly windowMs = WINDOW_MS,
  ) {}

  /** Durable when it resolves, unless it repeats one. Never rejects: what cannot be written is in the number of later. */
  async note(event: AuditEvent): Promise<void> {
    const { action, vtpm, reason } = event;
    const kind = `${action} ${vtpm} ${reason?.code}`;
    const known = this.#kinds.get(kind);
    if (known) {
      known.times += 1;
      return;
    }
    if (this.#kinds.size >= MAX_TOLD_APART) {
      this.#noteOther(event);
      return;
    }
    const repeated = { event, times: 0 };
    this.#kinds.set(kind, repeated);
    this.#timer ??= setInterval(() => void this.flush(), this.windowMs).unref();
    await this.#append(event, repeated, 1);
  }

  /** Writes what was counted. A kind that did not come again is forgotten. */
  async flush(): Promise<void> {
    const writes: Promise<void>[] = [];
    for (const [kind, repeated] of this.#kinds) {
      const { event, times } = repeated;
      if (times === 0) {
        this.#kinds.delete(kind);
        continue;
      }
      repeated.times = 0;
      const facts = { ...event.facts, times: String(times) };
      writes.push(this.#append({ ...event, facts }, repeated, times));
    }
    if (this.#kinds.size === 0) this.#stop();
    await Promise.all(writes);
  }

  async close(): Promise<void> {
    this.#stop();
    await this.flush();
  }

  #noteOther({ action }: AuditEvent): void {
    const other = this.#kinds.get(OTHER) ?? {
      event: { actor: 'manager', action, verdict: 'refused', reason: { code: OTHER, message: OTHERS_TEXT } },
      times: 0,
    };
    other.times += 1;
    this.#kinds.set(OTHER, other);
  }

  async #append(event: AuditEvent, repeated: Repeated, times: number): Promise<void> {
    try {
      await this.audit.append(event);
    } catch {
      repeated.times += times;
    }
  }

  #stop(): void {
    clearInterval(this.#timer);
    this.#timer = undefined;
  }
}

const OTHER = 'others';
const OTHERS_TEXT = 'too many different refusals at once to tell them apart; the log of the service has each';
