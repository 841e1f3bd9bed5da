import { randomBytes } from 'node:crypto';
import { closeSync } from 'node:fs';
import { Socket } from 'node:net';
import { duplexPair } from 'node:stream';
import { boxKeyPair, encode, type Verb } from 'vtpm-proto';
import type { Doors } from '../channels/doors.js';
import { type Left, openLeft } from '../checkpoint/left.js';
import { getRandom } from '../engine/command.js';
import { type Identity, readIdentity } from '../manager-link/load.js';
import { LoadKeys } from '../manager-link/load-keys.js';
import { openManagerLink } from '../manager-link/manager-link.js';
import { encodeSuspended } from '../state-blob/suspended.js';
import type { CheckpointDescriptors } from './control-channel.js';
import { HOLD_MS } from './outage-policy.js';
import { arrive, beginRun } from './power.js';
import { type KeptTpm, playManager } from './rehearsal-manager.js';
import { loadTpm, type ServedTpm } from './served-tpm.js';

/** Two connected sockets, for a guest and for its door. They can be made before a worker is locked down only. */
export type RehearsalStage = readonly [number, number];

/**
 * Does everything that the start of a new TPM does, then that of one which was made before, and then what the arrival of one
 * from another host does, with managers made up in this process and a TPM that is thrown away: what is compiled, bound and
 * paged in now, nobody waits for later. Nothing of it is left but that, and the descriptors are closed.
 * @param checkpoint of a VM run that there is not
 */
export async function rehearse(
  stage: RehearsalStage,
  checkpoint: CheckpointDescriptors | undefined,
): Promise<void> {
  const left = openLeft(checkpoint);
  const made = await play(left, ['MANUFACTURE', 'COLD'], undefined, async (tpm, identity) => {
    await beginRun(tpm, identity);
    await useDoor(tpm.doors, stage);
    const volatile = tpm.engine.volatileState();
    const suspended = { reference: randomBytes(32), volatile, isMoving: true, owners: Buffer.alloc(0) };
    return { suspended: encodeSuspended(suspended), permanent: tpm.engine.powerOff() };
  });
  const { permanent } = made;
  await play(left, ['COLD'], { permanent }, beginRun);
  await play(left, ['RESUME'], made, (tpm) => arrive(tpm));
  if (checkpoint) for (const fd of Object.values(checkpoint.pipe)) closeSync(fd);
  // What a start allocates finds room then.
  globalThis.gc?.({ type: 'minor' });
}

/** One life of a TPM. */
async function play<T>(
  left: Left | undefined,
  verbs: Verb[],
  kept: KeptTpm | undefined,
  live: (tpm: ServedTpm, identity: Identity) => Promise<T>,
): Promise<T> {
  const [here, there] = duplexPair();
  const managerKeys = boxKeyPair();
  const keys = new LoadKeys();
  playManager(there, managerKeys, keys.publicKey, kept);
  const identity = readIdentity({
    ticket: ticketText(verbs),
    managerKey: Buffer.from(managerKeys.publicKey).toString('hex'),
    startup: 'clear',
  });
  const link = openManagerLink(here);
  return await new Promise<T>((resolve, reject) => {
    const nothing = (): void => {};
    const events = {
      ...{ linkUp: nothing, linkLost: nothing, failed: reject, log: nothing },
      ...{ dataChannel: nothing, vmmChanged: nothing, vmmShutDown: nothing },
    };
    const run = async (): Promise<T> => {
      const { tpm } = await loadTpm(link, keys, { identity, holdTimes: HOLD_MS, left }, events);
      try {
        const result = await live(tpm, identity);
        tpm.session.close();
        return result;
      } finally {
        // What it would still ask of its TPM is nothing to the next part of the rehearsal.
        tpm.queue.kill();
        tpm.engine.terminate();
      }
    };
    run().then(resolve, reject);
  });
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

function ticketText(verbs: Verb[]): string {
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
    verbs,
    bootId: randomBytes(16),
    expiresAtMonotonicMs: 0n,
  });
  const [signature, delegation, delegationSignature] = [randomBytes(64), randomBytes(200), randomBytes(64)];
  return encode('SignedTicket', { ticket, signature, delegation, delegationSignature }).toString('base64');
}
