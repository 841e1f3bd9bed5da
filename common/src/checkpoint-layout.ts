/**
 * Where things lie in the memory that a supervisor and the workers of one VM run share. Numbers are little-endian; u64
 * that stay below 2^53. A worker writes, the supervisor only reads and believes nothing.
 *
 * The first page says what is going on with the pipe that answers go through: `begun` is the number of the answer that
 * is about to be written into it, for which connection and how many bytes of command; `piped` that of the newest one that
 * is wholly in it. Three slots follow: u64 sequence, u32 length, then the sealed unit. The sequence of a slot is 0 while it
 * is written.
 *
 * Why three: a successor needs the newest whole unit, by whose number it knows that it missed nothing, and the one before
 * it, from which it goes on where the save of the newest was not committed. Until a newer unit is whole, neither may be
 * opened.
 *
 * Behind them: the answer that is being put into the page of a ring, which has no room for the command beside it. u64 number, 0
 * while it is written, u32 connection, u32 length, then the bytes.
 */
export const CHECKPOINT_LAYOUT = {
  bytes: 256 * 1024,
  begun: 0,
  piped: 8,
  connection: 16,
  commandLength: 20,
  /**
   * u32 each: connections whose command was taken from its socket and not answered yet, where nothing is check-pointed; 0
   * for none.
   */
  taken: 1024,
  takenCount: 256,
  /** u32: what a VMM has brought in of a TPM that is off. */
  broughtIn: 2048,
  /**
   * As `begun` to `commandLength`, for the answers to a VMM's control requests, which have a pipe of their own; u32
   * `locality` is the one that the VMM has chosen, and `torn` the control connection of which a part of a request was taken.
   */
  control: { begun: 2304, piped: 2312, connection: 2320, commandLength: 2324 },
  locality: 2328,
  torn: 2332,
  /** u32: the VMM has switched off the TPM while that was on its way to another host. */
  switchedOff: 2336,
  /**
   * References to the state, to the permanent half and to the volatile one: what was given out at the last suspension, or what
   * a VMM brought before there was a TPM. u64 length, 0 while it is written, then the bytes.
   */
  references: [2560, 2560 + 256],
  referenceBytes: 248,
  /** The first two lie where versions with two slots of twice the size have theirs: each reads what the other's workers left. */
  slots: [4096, 4096 + 126 * 1024, 4096 + 63 * 1024],
  slotBytes: 63 * 1024,
  /** Of a slot, before the unit: sequence (8), length (4), nothing (4). */
  slotHeader: 16,
  ringAnswer: 4096 + 189 * 1024,
  ringAnswerHeader: 16,
  ringAnswerBytes: 4096,
} as const;
