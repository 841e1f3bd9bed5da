import { randomBytes } from 'node:crypto';
import { bootId, monotonicMs } from 'vtpm-common';
import { encode, type MigrateMode, type SigningKey, signMigrateOrder, uuidToBytes } from 'vtpm-proto';
import { ToolstackError } from '../../error.js';
import type { Context } from '../context.js';
import type { ManagerVtpm } from '../manager-api.js';
import type { ManagerPeer } from '../peer-api.js';
import type { SupervisorVtpm } from '../supervisor-api.js';
import { sayElsewhere } from '../whereabouts.js';

/** How long an order may be begun with, unless it says so itself. */
const LIFETIME_MS = 60_000;

export interface OrderOptions {
  readonly isDryRun: boolean;
  /** How it is to be stopped; as it is found unless given. */
  readonly mode: 'OFFLINE' | 'LIVE' | undefined;
  readonly timeoutSeconds: number | undefined;
}

/** @throws ToolstackError `unknown-peer` */
export async function findPeer(name: string, { manager }: Pick<Context, 'manager'>): Promise<ManagerPeer> {
  const peer = (await manager.peer.list()).find((other) => other.name === name);
  if (peer) return peer;
  throw new ToolstackError(
    'unknown-peer',
    `no peer is called ${name}; vtpmctl peer list shows whom this host knows, vtpmctl peer add makes another known`,
  );
}

/**
 * An order, a serialised SignedMigrateOrder, for one vTPM as it is now. The manager refuses it where the vTPM was loaded since.
 * @throws ToolstackError `not-stopped`, `not-running`, `bad-request` where its state is none that can be moved
 */
export async function makeOrder(
  key: SigningKey,
  vtpm: SupervisorVtpm,
  peer: Pick<ManagerPeer, 'hostId'>,
  options: OrderOptions,
  { manager }: Pick<Context, 'manager'>,
): Promise<{ readonly bytes: Buffer; readonly mode: MigrateMode }> {
  const mode = modeOf(vtpm, options.mode);
  if (vtpm.description === undefined) {
    throw new ToolstackError('internal', 'the supervisor did not describe the vTPM; see vtpmctl logs');
  }
  const [{ managerId }, saved] = await Promise.all([manager.health(), savedOf(vtpm, manager)]);
  const lifetime = options.timeoutSeconds === undefined ? LIFETIME_MS : options.timeoutSeconds * 1000;
  const signed = signMigrateOrder(key, {
    format: 1,
    managerId: Buffer.from(managerId, 'hex'),
    toolstackKey: key.publicKey,
    vtpmUuid: uuidToBytes(vtpm.id),
    vmUuid: uuidToBytes(vtpm.vmUuid),
    destination: Buffer.from(peer.hostId, 'hex'),
    expectedEpoch: BigInt(saved.epoch),
    leastGeneration: BigInt(saved.generation),
    migrationId: randomBytes(16),
    bootId: bootId(),
    expiresAtMonotonicMs: monotonicMs() + BigInt(lifetime),
    mode,
    dryRun: options.isDryRun,
    description: Buffer.from(vtpm.description),
  });
  return { bytes: encode('SignedMigrateOrder', signed), mode };
}

async function savedOf({ id, name }: SupervisorVtpm, manager: Context['manager']): Promise<ManagerVtpm> {
  try {
    return await manager.vtpm(id);
  } catch (caught) {
    if (ToolstackError.from(caught).code !== 'unknown-vtpm') throw caught;
    throw new ToolstackError(
      'unknown-vtpm',
      `${name} was never started, so there is no TPM that could be moved; create it at the other host, or here: vtpmctl start ${name}`,
      { cause: caught },
    );
  }
}

function modeOf(vtpm: SupervisorVtpm, wanted: OrderOptions['mode']): MigrateMode {
  const { name, state } = vtpm;
  if (state === 'stopped') {
    if (wanted !== 'LIVE') return 'OFFLINE';
    throw new ToolstackError(
      'not-running',
      `${name} is stopped; leave --live out, or: vtpmctl start ${name}`,
    );
  }
  if (state === 'running') {
    if (wanted === 'OFFLINE') {
      throw new ToolstackError('not-stopped', `${name} runs; stop it first: vtpmctl stop ${name}`);
    }
    // Its VMM moves with it, and asks for the TPM's state at the other end itself.
    return vtpm.vmm?.connected && wanted === undefined ? 'VMM' : 'LIVE';
  }
  throw new ToolstackError('busy', `${name} cannot be moved: ${sayState(vtpm)}`);
}

function sayState(vtpm: SupervisorVtpm): string {
  const { name, state, reason } = vtpm;
  switch (state) {
    case 'crashed':
    case 'lost':
      return `it has ${state === 'lost' ? 'lost its state' : 'crashed'} (${reason ?? 'no reason is known'}); stop it first: vtpmctl stop ${name}`;
    default:
      return sayElsewhere(vtpm) ?? `it is ${state}; try again in a moment`;
  }
}
