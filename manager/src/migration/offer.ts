import type { MigrationOffer } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import {
  checkFormats,
  checkLibtpms,
  LEAST_VERSION,
  MOST_VERSION,
  OWN_RECORD_FORMAT,
} from './compatibility.js';
import { checkLengths } from './lengths.js';

/**
 * Whether what a destination says first can be gone on with, as far as that can be told from it alone.
 * @param libtpmsVersion that wrote the state
 * @throws ManagerError `incompatible`, `bad-request`
 */
export function checkOffer(offer: MigrationOffer, libtpmsVersion: string): void {
  if (offer.version < LEAST_VERSION || offer.version > MOST_VERSION) {
    throw new ManagerError('incompatible', `the destination wants version ${offer.version} of the protocol`);
  }
  checkLengths('offer', [
    ['nonce', offer.nonce, 32],
    ['session key', offer.sessionKey, 32],
    ['identifier', offer.identifier, 32],
  ]);
  checkFormats(OWN_RECORD_FORMAT, offer.recordFormat);
  checkLibtpms(libtpmsVersion, offer.libtpmsVersion);
}
