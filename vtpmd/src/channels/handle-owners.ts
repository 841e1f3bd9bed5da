import { commandCode, HEADER_BYTES, responseCode, TPM_CC, TPM_RC_SUCCESS } from '../engine/command.js';

/** Who loaded something into the TPM. */
export interface HandleOwner {
  /** Process id of the client, 0 where it is not known. */
  readonly client: number;
  /** Number of the connection. */
  readonly connection: number;
}

/**
 * Knows which client's commands loaded which transient objects and sessions, so that they can be flushed when it is
 * gone, as /dev/tpmrm0 does: libtpms has three slots of each. A handle belongs to whoever got it last, because the TPM
 * gives the numbers again. A session whose context was saved is nobody's: its client may come back with it.
 */
export class HandleOwners {
  readonly #owners = new Map<number, HandleOwner>();

  /** Takes note of a command that ran. What a source without owner loads stays until it flushes it itself. */
  observe(owner: HandleOwner | undefined, command: Buffer, response: Buffer): void {
    const effect = EFFECT.get(commandCode(command));
    if (effect === undefined || responseCode(response) !== TPM_RC_SUCCESS) return;
    if (effect === 'loads') {
      if (response.length < HEADER_BYTES + 4) return;
      const handle = response.readUInt32BE(HEADER_BYTES);
      if (owner) this.#owners.set(handle, owner);
      else this.#owners.delete(handle);
      return;
    }
    const offset = effect === 'flushes second' ? HEADER_BYTES + 4 : HEADER_BYTES;
    if (command.length < offset + 4) return;
    const handle = command.readUInt32BE(offset);
    if (effect !== 'saves' || isSession(handle)) this.#owners.delete(handle);
  }

  /** Clients that have something loaded. */
  clients(): Set<number> {
    return new Set(Array.from(this.#owners.values(), ({ client }) => client));
  }

  /** The handles of all owners that match; they are forgotten here. */
  release(matches: (owner: HandleOwner) => boolean): number[] {
    const handles: number[] = [];
    for (const [handle, owner] of this.#owners) {
      if (!matches(owner)) continue;
      handles.push(handle);
      this.#owners.delete(handle);
    }
    return handles;
  }
}

type Effect = 'loads' | 'flushes' | 'flushes second' | 'saves';

const EFFECT: ReadonlyMap<number, Effect> = new Map<number, Effect>([
  [TPM_CC.CreatePrimary, 'loads'],
  [TPM_CC.CreateLoaded, 'loads'],
  [TPM_CC.Load, 'loads'],
  [TPM_CC.LoadExternal, 'loads'],
  [TPM_CC.ContextLoad, 'loads'],
  [TPM_CC.HmacStart, 'loads'],
  [TPM_CC.HashSequenceStart, 'loads'],
  [TPM_CC.StartAuthSession, 'loads'],
  [TPM_CC.FlushContext, 'flushes'],
  [TPM_CC.SequenceComplete, 'flushes'],
  // Its first handle is the PCR.
  [TPM_CC.EventSequenceComplete, 'flushes second'],
  [TPM_CC.ContextSave, 'saves'],
]);

/** HMAC (0x02) and policy (0x03) sessions (part 2, section 7.2). */
function isSession(handle: number): boolean {
  const type = handle >>> 24;
  return type === 0x02 || type === 0x03;
}
