import type { Frame } from '../channels/framing.js';
import type { HandleOwner } from '../channels/handle-owners.js';
import { errorResponse, TPM_RC_FAILURE } from '../engine/command.js';
import type { Locality } from '../engine/engine.js';
import type { ClientKind } from './outage-policy.js';

/** Who sends commands: one connection, or the worker itself. It has at most one command in the queue. */
export interface CommandSource {
  /** The command, of HEADER_BYTES at least. The queue replaces it by a copy where it has to wait. */
  command: Buffer;
  /** At which it runs; 0 where absent. */
  readonly locality?: Locality;
  /** What it came in; the answer goes back in it. */
  readonly frame?: Frame | undefined;
  /** It does not run, and this is the code of its answer. */
  readonly refusal?: number | undefined;
  /** Number of the connection, where workers that come after this one know it by that. */
  readonly connection?: number | undefined;
  /** Of what the command loads into the TPM. */
  readonly owner?: HandleOwner | undefined;
  /** Absent for commands of the worker itself. */
  readonly kind?: ClientKind;
  /** True once nobody waits for the answer: a command that did not run yet is dropped. */
  readonly isGone: boolean;
  /** Asked while a slow command of it runs: nobody will take the answer, though the event loop does not know it yet. */
  hasLeft?(): boolean;
  /** The command's own answer, or RETRY where it did not run; a view that is valid during the call. */
  answer(response: Buffer): void;
  /** Instead of `answer`: the command was dropped and did not run. */
  dropped(): void;
}

/** Of a TPM that is off. */
export function refuse(source: CommandSource): void {
  // The worker's own only make room in a TPM that is not there any more.
  if (source.kind === undefined) source.dropped();
  else source.answer(errorResponse(TPM_RC_FAILURE));
}

/** The same command, which runs even where its sender is gone by then. */
export function stayingSource(source: CommandSource): CommandSource {
  return {
    command: source.command,
    connection: source.connection,
    owner: source.owner,
    frame: source.frame,
    refusal: source.refusal,
    ...(source.kind !== undefined && { kind: source.kind }),
    ...(source.locality !== undefined && { locality: source.locality }),
    isGone: false,
    answer: (response) => source.answer(response),
    dropped: () => source.dropped(),
  };
}
