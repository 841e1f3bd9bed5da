import { randomBytes } from 'node:crypto';
import { closeSync } from 'node:fs';
import { Socket } from 'node:net';
import { duplexPair } from 'node:stream';
import { boxKeyPair, encode } from 'vtpm-proto';
import type { Doors } from '../channels/doors.js';
import { openLeft } from '../checkpoint/left.js';
import { getRandom } from '../engine/command.js';
import { readIdentity } from '../manager-link/load.js';
import { LoadKeys } from '../manager-link/load-keys.js';
import { openManagerLink } from '../manager-link/manager-link.js';
import type { CheckpointDescriptors } from './control-channel.js';
import { HOLD_MS } from './outage-policy.js';
import { beginRun } from './power.js';
import { playManager } from './rehearsal-manager.js';
import { loadTpm } from './served-tpm.js';

/** Two connected sockets, for a guest and for its door. They can be made before a worker is locked down only. */
export type RehearsalStage = readonly [number, number];

/**
 * Does everything once that a start does, with a manager made up in this process and a TPM that is thrown away: what is
 * compiled, bound and paged in now, the start does not wait for. Nothing of it is left but that, and the descriptors are closed.
 * @param checkpoint of a VM run that there is not
 */
export async function rehearse(
  stage: RehearsalStage,
  checkpoint: CheckpointDescriptors | undefined,
): Promise<void> {
  const [here, there] = duplexPair();
  const managerKeys = boxKeyPair();
  const keys = new LoadKeys();
  playManager(there, managerKeys, keys.publicKey);
  const identity = readIdentity({
    ticket: ticketText(),
    managerKey: Buffer.from(managerKeys.publicKey).toString('hex'),
    startup: 'clear',
  });
  const link = openManagerLink(here);
  const parts = { identity, holdTimes: HOLD_MS, left: openLeft(checkpoint) };
  await new Promise<void>((resolve, reject) => {
    const nothing = (): void => {};
    const events = {
      ...{ linkUp: nothing, linkLost: nothing, failed: reject, log: nothing },
      ...{ dataChannel: nothing, vmmChanged: nothing, vmmShutDown: nothing },
    };
    const play = async (): Promise<void> => {
      const { tpm } = await loadTpm(link, keys, parts, events);
      try {
        tpm.session.attach(link);
        await beginRun(tpm, identity);
        await useDoor(tpm.doors, stage);
        tpm.session.close();
      } finally {
        tpm.engine.terminate();
      }
    };
    play().then(resolve, reject);
  });
  if (checkpoint) for (const fd of Object.values(checkpoint.pipe)) closeSync(fd);
}

/** One guest that asks once. */
async function useDoor(doors: Doors, [here, there]: readonly [number, number]): Promise<void> {
  const guest = new Socket({ fd: here });
  const closed = new Promise<void>((resolve) =>
    doors.open({ kind: 'tpm', id: 1, fd: there, peer: undefined }, resolve),
  );
  const answered = new Promise((resolve) => guest.once('data', resolve));
  guest.write(getRandom());
  await answered;
  guest.destroy();
  await closed;
}

function ticketText(): string {
  const ticket = encode('Ticket', {
    format: 1,
    managerId: randomBytes(32),
    vtpmUuid: randomBytes(16),
    vmUuid: randomBytes(16),
    vmRunId: randomBytes(16),
    workerPublicKey: randomBytes(32),
    imageDigest: randomBytes(32),
    isolation: 'sandbox',
    expectedEpoch: 0n,
    verbs: ['MANUFACTURE', 'COLD'],
    bootId: randomBytes(16),
    expiresAtMonotonicMs: 0n,
  });
  const [signature, delegation, delegationSignature] = [randomBytes(64), randomBytes(200), randomBytes(64)];
  return encode('SignedTicket', { ticket, signature, delegation, delegationSignature }).toString('base64');
}
