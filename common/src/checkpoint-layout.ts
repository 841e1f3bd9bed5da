/**
 * Where things lie in the memory that a supervisor and the workers of one VM run share. Numbers are little-endian; u64
 * that stay below 2^53. A worker writes, the supervisor only reads and believes nothing.
 *
 * The first page says what is going on with the pipe that answers go through: `begun` is the number of the answer that
 * is about to be written into it, for which connection and how many bytes of command; `piped` that of the newest one that
 * is wholly in it. Two slots follow, written in turn: u64 sequence, u32 length, then the sealed unit. The sequence of a
 * slot is 0 while it is written.
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
  slots: [4096, 4096 + 126 * 1024],
  slotBytes: 126 * 1024,
  /** Of a slot, before the unit: sequence (8), length (4), nothing (4). */
  slotHeader: 16,
} as const;
