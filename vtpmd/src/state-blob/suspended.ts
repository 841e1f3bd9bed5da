import { decode, encode, type StateAction, type StateUse, type Suspended as Suspension } from 'vtpm-proto';
import { type ReferredState, referenceDigest } from './reference.js';

/** The TPM as it is between its taking-out and its bringing-in. */
export interface Suspended extends ReferredState {
  readonly reference: Buffer;
  readonly volatile: Buffer;
  /** The manager froze it, and nobody has the reference: whoever loads it in the same VM run goes on at once. */
  readonly isMoving: boolean;
  /** As HandleOwners.serialised. */
  readonly owners: Buffer;
}

/** What the manager keeps of it, for workers alone. The caller wipes it. */
export function encodeSuspended({
  reference,
  volatile,
  isMoving,
  owners,
}: Omit<Suspended, 'generation'>): Buffer {
  return encode('SuspendedState', {
    ...{ reference, volatile, moving: isMoving },
    owners: isMoving ? owners : new Uint8Array(0),
  });
}

/** A copy: the grant is wiped. */
export function readSuspended({ volatile, generation }: Suspension): Suspended {
  const state = decode('SuspendedState', volatile);
  return {
    reference: Buffer.from(state.reference),
    volatile: Buffer.from(state.volatile),
    isMoving: state.moving,
    owners: Buffer.from(state.owners),
    generation,
  };
}

export function useOf(action: StateAction, { reference }: Pick<Suspended, 'reference'>): StateUse {
  return { action, digest: referenceDigest(reference) };
}
