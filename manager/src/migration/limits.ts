/**
 * Milliseconds that each step of a migration may take. Until `ready` the vTPM runs on meanwhile; what comes after the
 * freeze is as short as it can be without giving up on a slow chip.
 */
export const LIMITS_MS = {
  /** TCP, TLS and the stream. */
  connecting: 15_000,
  /** The first message of a client. */
  hello: 10_000,
  /** A chip makes a key, certifies and quotes it: seconds on slow ones. */
  attesting: 60_000,
  /** Until the toolstack at the destination has said whether it takes the vTPM, and its worker waits. */
  accepting: 120_000,
  /** READY at the source: `accepting`, and an unwrapping. */
  ready: 150_000,
  /** STATE at the destination: the VMM's RAM may still be on its way. */
  state: { LIVE: 60_000, OFFLINE: 60_000, VMM: 24 * 3_600_000 },
  /** The worker stops between two commands and saves. */
  freezing: 15_000,
  /** The toolstack has ended the worker. */
  reaping: 30_000,
  /** The decision, which the chip counts; in mode VMM the VMM has to ask for its TPM first. */
  deciding: { LIVE: 30_000, OFFLINE: 30_000, VMM: 3_600_000 },
  /** The source's tombstone. */
  settling: 30_000,
  /** How long an order waits for an answer to its inquiry before it is told that it is in doubt. */
  asking: 20_000,
} as const;

/** Pauses between two inquiries; the last one comes again and again. */
export const INQUIRE_AFTER_MS: readonly number[] = [0, 250, 1_000, 3_000, 10_000, 30_000, 60_000];

/** At once, at each end; more are told to come back. */
export const MAX_SESSIONS = 64;
/** Questions of one peer about migrations that nobody knows here: each wears the TPM's memory. */
export const STRANGE_INQUIRIES = { burst: 256, perSecond: 0.1 } as const;
/** Decided ones that are remembered for who asks late. */
export const MAX_REMEMBERED = 1024;
/** An order is for now: one that is good for longer would have to be remembered as long. */
export const MAX_ORDER_LIFETIME_MS = 3_600_000n;
/** What the toolstack says of the vTPM for the one at the destination, in bytes. */
export const MAX_DESCRIPTION_BYTES = 16 * 1024;
/** Pauses between two rounds of questions about tombstones. */
export const SETTLE_AFTER_MS: readonly number[] = [5_000, 30_000, 120_000, 600_000];
/** From the source's word that it is settled to its writing here: what the guest waits for comes first. */
export const SETTLE_DELAY_MS = 1_000;
