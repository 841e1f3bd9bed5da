/** After an answer: how long the next command is waited for outside of the event loop, in microseconds. */
export const STAY_MICROSECONDS = 100;
/** Bounds of one stay: nothing else of the worker happens meanwhile. */
export const STAY_COMMANDS = 64;
export const STAY_MILLISECONDS = 5;
