import { randomBytes } from 'node:crypto';
import { closeSync } from 'node:fs';
import { Socket } from 'node:net';
import { duplexPair } from 'node:stream';
import { boxKeyPair, encode } from 'vtpm-proto';
import { Doors } from '../channels/doors.js';
import { HandleOwners } from '../channels/handle-owners.js';
import { AnswerPipe } from '../checkpoint/answer-pipe.js';
import { CheckpointKeeper } from '../checkpoint/keeper.js';
import { CheckpointMemory } from '../checkpoint/memory.js';
import { UnitSealer } from '../checkpoint/unit.js';
import { getRandom, startupClear } from '../engine/command.js';
import { startEngine } from '../engine/engine.js';
import { loadVtpm, readIdentity } from '../manager-link/load.js';
import { LoadKeys } from '../manager-link/load-keys.js';
import { openManagerLink } from '../manager-link/manager-link.js';
import { SaveSession } from '../manager-link/save-session.js';
import { CommandQueue } from './command-queue.js';
import { HOLD_MS, OutagePolicy } from './outage-policy.js';
import { runOwnCommand } from './own-command.js';
import { PowerState } from './power-state.js';
import { playManager } from './rehearsal-manager.js';

/** What can be made before a worker is locked down only. It is closed by whoever has it last. */
export interface RehearsalStage {
  /** Two connected sockets, for a guest and for its door. */
  readonly door: readonly [number, number];
  readonly pipe: { readonly read: number; readonly write: number };
}

/**
 * Does everything once that a start does, with a manager made up in this process and a TPM that is thrown away: what is
 * compiled, bound and paged in now, the start does not wait for. Nothing of it is left but that.
 */
export async function rehearse(libtpmsVersion: string, stage: RehearsalStage): Promise<void> {
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
  const grant = await loadVtpm(link, identity, keys, libtpmsVersion);
  keys.wipe();
  const engine = startEngine({ manufacture: true });
  try {
    const session = new SaveSession(grant, identity.vtpmUuid, libtpmsVersion, {
      up: () => queue.release('link'),
      lost: () => {},
      over: () => {},
      freeze: () => {},
      thaw: () => {},
    });
    const owners = new HandleOwners();
    const memory = CheckpointMemory.ofOwn();
    const keeper = new CheckpointKeeper({
      memory,
      sealer: new UnitSealer(randomBytes(32), identity, grant.epoch),
      ...{ engine, owners, policy: new OutagePolicy(HOLD_MS, false), power: new PowerState() },
      granted: { generation: 0n, permanentDigest: new Uint8Array(32) },
      last: { sequence: 0, unit: 0, inUse: [] },
    });
    const queue = new CommandQueue({
      engine,
      persist: (permanent) => session.save(permanent),
      keep: (source, response, stored) => keeper.keep(source, response, stored),
      onFailure: () => {},
    });
    queue.hold('link');
    session.attach(link);
    await runOwnCommand(queue, startupClear());
    const pipe = new AnswerPipe(memory.marks, stage.pipe);
    await useDoor(new Doors(engine, queue, owners, { kept: { keeper, pipe, memory } }), stage.door);
    session.close();
  } finally {
    engine.terminate();
    closeSync(stage.pipe.read);
    closeSync(stage.pipe.write);
  }
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
