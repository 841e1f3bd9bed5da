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
  readonly #busy = new Set<number>();
  #serialised: Buffer | undefined;

  /** Takes note of a command that ran. What a source without owner loads stays until it flushes it itself. */
  observe(owner: HandleOwner | undefined, command: Buffer, response: Buffer): void {
    const effect = EFFECT.get(commandCode(command));
    if (effect === undefined || responseCode(response) !== TPM_RC_SUCCESS) return;
    this.#serialised = undefined;
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

  /** What `restore` takes: 12 bytes a handle. The same buffer until something changes. */
  serialised(): Buffer {
    if (!this.#serialised) {
      const entries = [
        ...Array.from(this.#owners, ([handle, { client, connection }]) => [handle, client, connection]),
        // No handle is 0: that is PCR 0.
        ...Array.from(this.#busy, (connection) => [0, 0, connection]),
      ];
      this.#serialised = Buffer.from(Uint32Array.from(entries.flat()).buffer);
    }
    return this.#serialised;
  }

  /** Takes over what a worker before this one knew. */
  restore(bytes: Buffer): void {
    this.#serialised = undefined;
    for (let offset = 0; offset + ENTRY_BYTES <= bytes.length; offset += ENTRY_BYTES) {
      const handle = bytes.readUInt32LE(offset);
      const connection = bytes.readUInt32LE(offset + 8);
      if (handle === 0) this.#busy.add(connection);
      else this.#owners.set(handle, { client: bytes.readUInt32LE(offset + 4), connection });
    }
  }

  /** Connections that brought more than one command, and are open. */
  get busy(): ReadonlySet<number> {
    return this.#busy;
  }

  setBusy(connection: number, isBusy: boolean): void {
    if (this.#busy.has(connection) === isBusy) return;
    this.#serialised = undefined;
    if (isBusy) this.#busy.add(connection);
    else this.#busy.delete(connection);
  }

  /** The handles of all owners that match; they are forgotten here. */
  release(matches: (owner: HandleOwner) => boolean): number[] {
    const handles: number[] = [];
    this.#serialised = undefined;
    for (const [handle, owner] of this.#owners) {
      if (!matches(owner)) continue;
      handles.push(handle);
      this.#owners.delete(handle);
    }
    return handles;
  }
}

/** u32 handle, client and connection, in the host's order: nobody reads them on another host. */
const ENTRY_BYTES = 12;

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
