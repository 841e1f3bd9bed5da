import { bytesEqual, type MigrationHello, type Peer, uuidToText } from 'vtpm-proto';
import { ManagerError } from '../error.js';
import { checkRight } from '../trust/peers.js';
import { MAX_STATE_BYTES } from './bundle.js';
import { checkFormats, checkLibtpms, commonVersion, OWN_RECORD_FORMAT } from './compatibility.js';
import { checkLengths } from './lengths.js';
import { MAX_DESCRIPTION_BYTES } from './limits.js';
import type { Host } from './ports.js';

/**
 * Whether what a source says first can be taken up by this host, as far as that can be told from it alone.
 * @returns the version of libtpms here
 * @throws ManagerError `incompatible`, `bad-request`, `too-large`, `unknown-peer`, `peer-forbidden`
 */
export function checkHello(hello: MigrationHello, peer: Peer, host: Host): string {
  commonVersion({ least: hello.leastVersion, most: hello.mostVersion });
  checkForm(hello);
  if (!bytesEqual(hello.source, peer.hostId)) {
    throw new ManagerError('unknown-peer', `host ${peer.name} gives itself out as another host`);
  }
  if (!bytesEqual(hello.destination, host.hostId)) {
    throw new ManagerError('unknown-peer', `host ${peer.name} means another host than this one`);
  }
  checkRight(peer, 'send');
  checkFormats(hello.recordFormat, OWN_RECORD_FORMAT);
  const libtpms = host.libtpmsVersion();
  checkLibtpms(hello.libtpmsVersion, libtpms);
  return libtpms;
}

function checkForm(hello: MigrationHello): void {
  checkLengths('HELLO', [
    ['migration id', hello.migrationId, 16],
    ['nonce', hello.nonce, 32],
    ['session key', hello.sessionKey, 32],
    ['source', hello.source, 32],
    ['destination', hello.destination, 32],
    ['vTPM uuid', hello.vtpmUuid, 16],
    ['VM uuid', hello.vmUuid, 16],
    ['VM run id', hello.vmRunId, 16],
  ]);
  if (hello.stateBytes > BigInt(MAX_STATE_BYTES)) {
    throw new ManagerError(
      'too-large',
      `a state of ${hello.stateBytes} bytes is announced for vTPM ${uuidToText(hello.vtpmUuid)}, at most ${MAX_STATE_BYTES} are taken`,
    );
  }
  if (hello.description.length > MAX_DESCRIPTION_BYTES || hello.libtpmsVersion.length > 64) {
    throw new ManagerError('too-large', `the description of the vTPM is over ${MAX_DESCRIPTION_BYTES} bytes`);
  }
}
