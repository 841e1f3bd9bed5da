import { commandCode, HEADER_BYTES, responseCode, TPM_CC, TPM_RC_SUCCESS } from '../engine/command.js';
import type { CommandSource } from '../worker/command-queue.js';

/**
 * Knows which client's commands loaded which transient objects and sessions, so that they can be flushed when it
 * disconnects, as /dev/tpmrm0 does: libtpms has three slots of each. A handle belongs to whoever got it last, because
 * the TPM gives the numbers again. A session whose context a client saved is nobody's any more.
 */
export class HandleOwners {
  readonly #owners = new Map<number, CommandSource>();

  observe(source: CommandSource, command: Buffer, response: Buffer): void {
    const kind = EFFECT.get(commandCode(command));
    if (kind === undefined || responseCode(response) !== TPM_RC_SUCCESS) return;
    if (kind === 'loads') {
      if (response.length >= HEADER_BYTES + 4) this.#owners.set(response.readUInt32BE(HEADER_BYTES), source);
      return;
    }
    const offset = kind === 'flushes-second' ? HEADER_BYTES + 4 : HEADER_BYTES;
    if (command.length < offset + 4) return;
    const handle = command.readUInt32BE(offset);
    if (kind !== 'saves' || isSession(handle)) this.#owners.delete(handle);
  }

  /** What `source` left loaded; it is forgotten here. */
  release(source: CommandSource): number[] {
    const handles: number[] = [];
    for (const [handle, owner] of this.#owners) {
      if (owner === source) handles.push(handle);
    }
    for (const handle of handles) this.#owners.delete(handle);
    return handles;
  }
}

type Effect = 'loads' | 'flushes' | 'flushes-second' | 'saves';

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
  [TPM_CC.EventSequenceComplete, 'flushes-second'],
  [TPM_CC.ContextSave, 'saves'],
]);

/** HMAC (0x02) and policy (0x03) sessions (part 2, section 7.2). */
function isSession(handle: number): boolean {
  const type = handle >>> 24;
  return type === 0x02 || type === 0x03;
}
