/** Tells a supervisor which descriptor holds what the program before it hands over. */
export const HANDOVER_FLAG = '--handover';
/** The same, of one that only says whether it would take it. */
export const CHECK_FLAG = '--check-handover';
