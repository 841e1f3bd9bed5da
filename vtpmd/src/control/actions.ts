import type { Locality } from '../engine/engine.js';
import type { KeepSave } from '../worker/power-switch.js';
import type { CommandName } from './commands.js';
import type { Asker } from './control-connection.js';
import type { ControlRequest } from './request.js';

/** What came of a request. */
export interface Outcome {
  readonly result: number;
  /** u32 fields of the response behind the result; the others are 0. */
  readonly words?: readonly number[];
  /** Bytes behind the fixed part of the response. */
  readonly content?: Buffer;
  /** Permanent state that is to be saved before the answer. */
  readonly stored?: Buffer | undefined;
  /** Done twice it would not be the same: a checkpoint says that it is done. */
  readonly isOnce?: boolean;
}

/** Does what the commands say. What throws a ControlRefusal is answered with its result. */
export type Actions = Readonly<
  Record<
    CommandName,
    (request: ControlRequest, asker: Asker, keepSave: KeepSave) => Outcome | Promise<Outcome>
  >
>;

/** What all commands of one VMM share, and what `vtpmctl show` says of it. */
export interface VmmState {
  locality: Locality;
}
