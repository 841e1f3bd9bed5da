import { bytesEqual } from 'vtpm-proto';
import { VtpmdError } from '../error.js';
import { type CheckpointMemory, SLOTS, type Slot } from './memory.js';
import { openUnit, type Unit, type UnitNames } from './unit.js';

/** The permanent state that the manager gave out. */
export interface GrantedState {
  readonly generation: bigint;
  /** SHA-256. */
  readonly permanentDigest: Uint8Array;
}

/** The unit that a worker goes on from. */
export interface ChosenUnit {
  readonly unit: Unit;
  /** Where it lies, and then where the newest one lies, if that is another. The next one goes into none of these. */
  readonly inUse: readonly Slot[];
}

/**
 * The unit that covers the last command that had an effect. That is the newest one, which must be the one that the
 * supervisor saw when the worker before was dead. Only where that one waited for a save which the manager has not
 * committed it is the one before: the effect never was, and its answer was never given.
 * @throws VtpmdError `no-checkpoint`: with anything else the guest could lose or repeat an effect
 */
export function chooseUnit(
  memory: CheckpointMemory,
  checkpointKey: Uint8Array,
  names: UnitNames,
  newest: number,
  granted: GrantedState,
): ChosenUnit {
  if (checkpointKey.length !== 32) throw refused('the manager keeps no checkpoint key of this VM run');
  const found = SLOTS.flatMap((slot) => {
    const content = memory.read(slot);
    return content ? [{ slot, ...content }] : [];
  }).sort((a, b) => b.sequence - a.sequence);
  const [first] = found;
  if (!first) throw refused('there is no checkpoint');
  if (first.sequence !== newest) {
    throw refused(`the newest checkpoint has the number ${first.sequence}, and ${newest} was seen before`);
  }
  const unit = openUnit(checkpointKey, names, first.sequence, first.sealed);
  if (!unit) throw refused('the newest checkpoint was changed, or is of another vTPM or VM run');
  if (isOf(unit, granted)) return { unit, inUse: [first.slot] };
  const second = found.find(({ sequence }) => sequence === unit.previous);
  if (unit.stored && second) {
    const before = openUnit(checkpointKey, names, second.sequence, second.sealed);
    if (before && isOf(before, granted)) return { unit: before, inUse: [second.slot, first.slot] };
  }
  throw refused(
    `the newest checkpoint belongs to generation ${unit.generation} of the permanent state, and the manager has ${granted.generation}`,
  );
}

function isOf(unit: Unit, { generation, permanentDigest }: GrantedState): boolean {
  return unit.generation === generation && bytesEqual(unit.permanentDigest, permanentDigest);
}

function refused(what: string): VtpmdError {
  return new VtpmdError('no-checkpoint', `${what}: the TPM cannot go on in this run of its VM`);
}
