import type { MigrateMode, MigrationHello } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import type { ExpectedState } from './bundle.js';
import type { TravellingPart } from './state-key.js';

/** Which parts a state has: without its volatile part a running TPM would be powered off on the way. */
const PARTS: Readonly<Record<MigrateMode, Pick<ExpectedState, 'required' | 'allowed'>>> = {
  OFFLINE: { required: ['PERMANENT'], allowed: ['PERMANENT', 'VOLATILE', 'REFERENCE_KEY'] },
  LIVE: { required: ['PERMANENT'], allowed: ['PERMANENT', 'VOLATILE', 'REFERENCE_KEY'] },
  VMM: {
    required: ['PERMANENT', 'VOLATILE', 'REFERENCE_KEY'],
    allowed: ['PERMANENT', 'VOLATILE', 'REFERENCE_KEY'],
  },
};

/** What has to come after a HELLO. */
export function expectedState(hello: MigrationHello, identifier: Buffer): ExpectedState {
  return {
    identifier,
    migrationId: hello.migrationId,
    vtpmUuid: hello.vtpmUuid,
    vmUuid: hello.vmUuid,
    epoch: hello.epoch,
    leastGeneration: hello.generation,
    ...PARTS[hello.mode],
  };
}

/** A suspended TPM has its volatile state with it; one with a reference to it, what the reference is held against. */
export function checkSuspension(
  mode: MigrateMode,
  isSuspended: boolean,
  parts: Readonly<Partial<Record<TravellingPart, Uint8Array>>>,
): void {
  if (isSuspended !== (parts.VOLATILE !== undefined) || (isSuspended && parts.REFERENCE_KEY === undefined)) {
    throw new ManagerError(
      'incomplete',
      `the state is not whole: a part of a ${isSuspended ? 'suspended' : 'stopped'} TPM is missing or too much (${mode})`,
    );
  }
}
