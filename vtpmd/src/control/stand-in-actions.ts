import type { CheckpointMemory } from '../checkpoint/memory.js';
import { VtpmdError } from '../error.js';
import { isReference, readReference, referenceDigest } from '../state-blob/reference.js';
import type { StateBlobType } from '../state-blob/state-blobs.js';
import type { Actions, Outcome } from './actions.js';
import { type CommonParts, commonActions, DONE } from './common-actions.js';
import { ControlRefusal, RESULT } from './results.js';
import { blobOutcome, blobTypeOf } from './state-blob-requests.js';

export interface StandInActionParts extends Omit<CommonParts, 'bufferSizeChanged'> {
  readonly memory: Pick<CheckpointMemory, 'reference' | 'keepReference' | 'dropReferences' | 'isSwitchedOff'>;
  /** Asks for the TPM. Rejects where it does not come; where it comes, another worker does the request. */
  call(request: string, referenceDigest?: Buffer): Promise<never>;
}

/** Where the memory of the run has the half. */
const HALVES: Readonly<Partial<Record<StateBlobType, 0 | 1>>> = { permanent: 0, volatile: 1 };

type OwnName = Exclude<keyof Actions, keyof ReturnType<typeof commonActions>>;

/**
 * The commands for a TPM that is on its way to another host, and still counts as on. What only asks is answered, what needs
 * the TPM asks for it back: that is how a VM goes on here whose migration failed.
 */
export function awayActions(parts: StandInActionParts & { switchedOff(): void }): Actions {
  const { memory, call } = parts;
  const off = (): Outcome => {
    memory.isSwitchedOff = true;
    parts.switchedOff();
    return DONE;
  };
  const own: Pick<Actions, OwnName> = {
    INIT: () => call('INIT'),
    STOP: off,
    SHUTDOWN: off,
    GET_TPMESTABLISHED: elsewhere,
    RESET_TPMESTABLISHED: () => call('RESET_TPMESTABLISHED'),
    // No command runs.
    CANCEL_TPM_CMD: () => DONE,
    HASH_START: () => call('HASH_START'),
    HASH_DATA: elsewhere,
    HASH_END: elsewhere,
    STORE_VOLATILE: elsewhere,
    GET_STATEBLOB: (request) => {
      const type = blobTypeOf(request);
      const half = HALVES[type];
      return blobOutcome(request, type, half === undefined ? undefined : memory.reference(half));
    },
    SET_STATEBLOB: () => call('SET_STATEBLOB'),
    LOCK_STORAGE: () => call('LOCK_STORAGE'),
  };
  const common = commonActions({ ...parts, bufferSizeChanged: () => {} });
  return {
    ...common,
    ...own,
    SET_DATAFD: async (request, asker, keepSave) => {
      // As with a TPM that is frozen: the VMM that took it out is gone, and this is another one.
      if (!parts.data.isOpen) off();
      return await common.SET_DATAFD(request, asker, keepSave);
    },
  };
}

/**
 * The commands where a TPM is to come with its VMM: it is off until then. What the VMM brings is looked at and kept; with INIT
 * it is known which state it means, and the TPM is asked for.
 * @param refused why the INIT that is in the socket is not done
 */
export function incomingActions(parts: StandInActionParts, refused: string | undefined): Actions {
  const { memory, call } = parts;
  /** Until the VMM stops the TPM: it brought what is no good, or the manager refused it. */
  let refusal = refused === undefined ? undefined : new VtpmdError('refused', refused);
  const off = (): Outcome => {
    memory.dropReferences();
    refusal = undefined;
    return DONE;
  };
  const take = (type: StateBlobType, blob: Buffer): void => {
    const half = HALVES[type];
    // There may be no such state: some VMMs bring that too.
    if (blob.length === 0) return;
    if (half === undefined || !isReference(blob)) {
      throw new VtpmdError(
        'plain-forbidden',
        'the state of this vTPM comes from its manager, and its VMM brings the reference to it',
      );
    }
    readReference(type, blob);
    memory.keepReference(half, blob);
  };
  const broughtDigest = (): Buffer => {
    const [permanent, volatile] = [memory.reference(0), memory.reference(1)];
    if (permanent && volatile) {
      const reference = readReference('permanent', permanent);
      if (reference.equals(readReference('volatile', volatile))) return referenceDigest(reference);
    }
    throw new VtpmdError('blob-incomplete', 'no reference to the state that is to come was brought in whole');
  };
  const own: Pick<Actions, OwnName> = {
    INIT: async () => {
      if (refusal) throw refusal;
      return await call('INIT', broughtDigest());
    },
    STOP: off,
    SHUTDOWN: off,
    SET_STATEBLOB: (request) => {
      if (refusal) throw refusal;
      try {
        take(blobTypeOf(request), request.content);
      } catch (error) {
        if (error instanceof VtpmdError) refusal = error;
        throw error;
      }
      return DONE;
    },
    LOCK_STORAGE: () => DONE,
    GET_TPMESTABLISHED: elsewhere,
    RESET_TPMESTABLISHED: elsewhere,
    CANCEL_TPM_CMD: elsewhere,
    HASH_START: elsewhere,
    HASH_DATA: elsewhere,
    HASH_END: elsewhere,
    STORE_VOLATILE: elsewhere,
    GET_STATEBLOB: elsewhere,
  };
  return { ...commonActions({ ...parts, bufferSizeChanged: () => {} }), ...own };
}

function elsewhere(): Outcome {
  throw new ControlRefusal(RESULT.Fail, 'the TPM is at another host, or on its way');
}
