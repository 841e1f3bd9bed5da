import { hash } from 'node:crypto';
import { setImmediate } from 'node:timers/promises';
import type { LoadGrant } from 'vtpm-proto';
import { Doors } from '../channels/doors.js';
import { HandleOwners } from '../channels/handle-owners.js';
import { type ChosenUnit, chooseUnit, type GrantedState } from '../checkpoint/choose.js';
import { CheckpointKeeper } from '../checkpoint/keeper.js';
import { type Checkpoint, type Left, lastOf } from '../checkpoint/left.js';
import { UnitSealer } from '../checkpoint/unit.js';
import { controlNumbers } from '../control/control-numbers.js';
import { servedActions } from '../control/served-actions.js';
import { VmmDoors, type VmmStatus } from '../control/vmm-doors.js';
import { CAP_AUDIT_COMMANDS, getCapability } from '../engine/command.js';
import type { TpmEngine } from '../engine/engine.js';
import { loadLibtpms } from '../engine/libtpms.js';
import { createLibtpmsEngine } from '../engine/libtpms-engine.js';
import { VtpmdError } from '../error.js';
import { type Identity, loadVtpm } from '../manager-link/load.js';
import type { LoadKeys } from '../manager-link/load-keys.js';
import type { ManagerLink } from '../manager-link/manager-link.js';
import { SaveSession } from '../manager-link/save-session.js';
import { readReference, referenceDigest } from '../state-blob/reference.js';
import { readSuspended, type Suspended } from '../state-blob/suspended.js';
import { VtpmStateBlobs } from '../state-blob/vtpm-state-blobs.js';
import { CommandQueue } from './command-queue.js';
import type { Log } from './log.js';
import { ManagerFreeze } from './manager-freeze.js';
import { type HoldTimes, OutagePolicy } from './outage-policy.js';
import { runOwnCommand } from './own-command.js';
import { PowerState } from './power-state.js';
import { PowerSwitch } from './power-switch.js';

/** A TPM, and what its commands and their effects go through. */
export interface ServedTpm {
  readonly engine: TpmEngine;
  readonly queue: CommandQueue;
  readonly session: SaveSession;
  readonly keeper: CheckpointKeeper | undefined;
  readonly doors: Doors;
  readonly power: PowerSwitch;
  readonly freeze: ManagerFreeze;
  readonly state: PowerState;
  readonly blobs: VtpmStateBlobs;
}

export interface ServedTpmEvents {
  /** The manager is there again. */
  linkUp(): void;
  /** Nothing can be saved. */
  linkLost(error: VtpmdError): void;
  /** It must not go on. */
  failed(error: unknown): void;
  /** A VMM gave this as its data channel. */
  dataChannel(fd: number): void;
  vmmChanged(status: VmmStatus): void;
  /** The VMM needs this TPM no more. */
  vmmShutDown(): void;
  readonly log: Log;
}

/** What a TPM is loaded for. */
export interface LoadParts {
  readonly identity: Identity;
  readonly holdTimes: HoldTimes;
  /** Of the VM run, where the supervisor gave that. */
  readonly left: Left | undefined;
}

export interface LoadedTpm {
  readonly tpm: ServedTpm;
  readonly epoch: bigint;
  /** What it goes on from; undefined at a power-on. */
  readonly chosen: ChosenUnit | undefined;
  /** It goes on from where it was frozen. */
  readonly hasArrived: boolean;
}

/**
 * Starts libtpms with the state that the manager gives out, and with the volatile state of a checkpoint where the TPM is to
 * go on, or with the one that it was frozen with. Where a VMM powers it, it stays off: but a new TPM is made. Its
 * session has the link. Wipes the keys, and those of the grant.
 * @throws VtpmdError
 */
export async function loadTpm(
  link: ManagerLink,
  keys: LoadKeys,
  parts: LoadParts,
  events: ServedTpmEvents,
): Promise<LoadedTpm> {
  const { identity, left } = parts;
  const grant = await loadVtpm(link, identity, keys, loadLibtpms().version, broughtDigest(parts));
  keys.wipe();
  if (identity.arrives && grant.manufacture) {
    throw new VtpmdError('protocol', 'a TPM that comes from another host is not made here');
  }
  const granted = {
    generation: grant.generation,
    permanentDigest: hash('sha256', grant.permanent, 'buffer'),
  };
  const moving = movingOf(grant);
  const chosen = chosenUnit(parts, grant, granted, moving !== undefined);
  const frozen = chosen ? undefined : moving;
  const goesOn = identity.power === 'on' && !identity.verbs.includes('COLD');
  if (goesOn && !grant.manufacture && !chosen && !frozen) {
    // A VM that runs must not get fresh PCRs.
    throw new VtpmdError('no-checkpoint', 'nothing is there that the TPM could go on from, and it must');
  }
  const state = new PowerState();
  if (chosen) {
    state.restore(chosen.unit.power);
  } else {
    state.isOff = identity.power === 'vmm' && !grant.manufacture && !frozen;
    if (frozen) state.isOrderly = false;
    state.bufferSize = identity.vmm.bufferSize;
    if (left) left.memory.locality = identity.vmm.locality;
  }
  const engine = createLibtpmsEngine();
  if (state.bufferSize > 0) engine.setBufferSize(state.bufferSize);
  const checkpoint = left && { left, chosen, granted };
  const tpm = compose(grant, parts, engine, state, checkpoint, frozen, events);
  tpm.session.attach(link);
  // The greeting goes out at the end of the turn: the manager has time for it while the TPM is powered on.
  await setImmediate();
  if (!state.isOff) {
    engine.powerOn({
      permanent: grant.manufacture ? undefined : grant.permanent,
      volatile: (chosen?.unit ?? frozen)?.volatile,
      manufacture: grant.manufacture,
    });
  }
  if (chosen && engine.storedAtStart && !engine.storedAtStart.equals(grant.permanent)) {
    throw new VtpmdError('no-checkpoint', 'libtpms changed the permanent state that it was given back');
  }
  moving?.volatile.fill(0);
  if (state.isOff) tpm.power.setOff(grant.permanent);
  grant.permanent.fill(0);
  grant.sessionKey.fill(0);
  grant.checkpointKey.fill(0);
  grant.referenceKey?.fill(0);
  grant.suspended?.volatile.fill(0);
  return { tpm, epoch: grant.epoch, chosen, hasArrived: frozen !== undefined };
}

/**
 * What a worker before this one left. Where the TPM was frozen and its next worker was lost before that was over, what it left
 * may be of a save that was never committed: then the TPM is where it was frozen.
 * @throws VtpmdError `no-checkpoint`
 */
function chosenUnit(
  { identity, left }: LoadParts,
  { checkpointKey }: LoadGrant,
  granted: GrantedState,
  isMoving: boolean,
): ChosenUnit | undefined {
  if (identity.arrives || !left?.resumes) return undefined;
  try {
    return chooseUnit(left.memory, checkpointKey, identity, left.resumes.newest, granted);
  } catch (error) {
    if (isMoving && VtpmdError.from(error).code === 'no-checkpoint') return undefined;
    throw error;
  }
}

/** Where it was frozen to go on elsewhere, nobody has gone on since, and its VM still runs. */
function movingOf({ suspended, arrived }: LoadGrant): Suspended | undefined {
  const state = suspended && readSuspended(suspended);
  if (state?.isMoving && arrived) return state;
  state?.volatile.fill(0);
  return undefined;
}

/** What the VMM brought for a vTPM that arrives, before there was one here. */
function broughtDigest({ identity, left }: LoadParts): Buffer | undefined {
  const blob = identity.arrives ? left?.memory.reference(0) : undefined;
  return blob && referenceDigest(readReference('permanent', blob));
}

function compose(
  grant: LoadGrant,
  { identity, holdTimes }: LoadParts,
  engine: TpmEngine,
  state: PowerState,
  checkpoint: Checkpoint | undefined,
  frozen: Suspended | undefined,
  events: ServedTpmEvents,
): ServedTpm {
  const owners = new HandleOwners();
  const policy = new OutagePolicy(holdTimes, identity.startup === 'none');
  if (frozen) {
    owners.restore(frozen.owners);
    policy.restore(false);
  }
  const keeper = checkpoint?.left.keeps
    ? new CheckpointKeeper({
        memory: checkpoint.left.memory,
        sealer: new UnitSealer(grant.checkpointKey, identity, grant.epoch),
        ...{ engine, owners, policy, power: state, granted: checkpoint.granted },
        last: lastOf(checkpoint),
      })
    : undefined;
  if (checkpoint?.chosen) {
    owners.restore(checkpoint.chosen.unit.owners);
    policy.restore(checkpoint.chosen.unit.isFirmware);
  }
  let isLost = false;
  const session = new SaveSession(grant, identity.vtpmUuid, engine.libtpmsVersion, {
    up: () => {
      if (isLost) events.linkUp();
      isLost = false;
      queue.outageOver();
      queue.release('link');
      power.linkUp();
      freeze.thaw();
    },
    lost: (error) => {
      queue.outage();
      isLost = true;
      events.linkLost(error);
    },
    over: (error) => events.failed(error),
    freeze: (suspends) => freeze.freeze(suspends),
    thaw: () => freeze.thaw(),
  });
  const queue = new CommandQueue({
    engine,
    persist: (permanent) => session.save(permanent),
    observe: (source, command, response, stored) => {
      owners.observe(source.owner, command, response);
      policy.ran(command, response);
      state.ran(command, response, stored !== undefined);
    },
    isOff: () => state.isOff,
    ...(keeper && {
      keep: (source, response, stored) => {
        keeper.keep(source, response, stored);
        const question = keeper.noEffect.takeQuestion();
        if (question !== undefined) askForAudits(question, queue, keeper, events);
      },
    }),
    policy,
    // Behind what the VMM asks for at the moment.
    onWaiting: (source) => void power.settled().then(() => blobs.commandWaits(source)),
    onFailure: (error) => events.failed(error),
  });
  // Until the first link is up.
  queue.hold('link');
  const { verbs } = identity;
  const blobs = new VtpmStateBlobs({
    ...{ engine, queue, session, keeper, owners, grant },
    names: identity,
    mayExport: verbs.includes('EXPORT'),
    mayImport: verbs.includes('IMPORT'),
    whenLinked: () => power.whenLinked(),
    stepDone: () => power.settled(),
    note: checkpoint?.left.memory ?? { broughtIn: 0 },
    kept: checkpoint?.left.memory ?? { keepReference: () => {}, dropReferences: () => {} },
    failed: (error) => events.failed(error),
  });
  const power = new PowerSwitch({
    ...{ engine, queue, session, keeper, owners, policy, state, blobs },
    startup: identity.startup,
    holdMs: holdTimes.power,
    changed: () => vmm?.changed(),
  });
  const freeze = new ManagerFreeze({
    ...{ queue, session, power, blobs },
    failed: (error) => events.failed(error),
  });
  const { memory, controlPipe } = checkpoint?.left ?? {};
  const vmm: VmmDoors | undefined =
    memory && controlPipe
      ? new VmmDoors({
          actions: (own, data) =>
            servedActions({ ...{ engine, queue, keeper, power, state, blobs, data }, vmm: own }),
          isOn: () => engine.isOn,
          perform: (step) => power.perform(step),
          ...{ memory, pipe: controlPipe, log: events.log },
          numbers: keeper
            ? { takeAnswerNumber: () => keeper.takeControlNumber() }
            : controlNumbers(memory.controlMarks),
          bufferSize: () => engine.bufferSizes.size,
          offer: (fd) => events.dataChannel(fd),
          dropGone: () => queue.dropGone(),
          status: (status) => events.vmmChanged(status),
          shutDown: () => events.vmmShutDown(),
          failed: (error) => events.failed(error),
        })
      : undefined;
  const kept = keeper && checkpoint && { keeper, pipe: checkpoint.left.pipe, memory: checkpoint.left.memory };
  const taken = kept ? undefined : checkpoint?.left.memory.taken;
  const doors = new Doors(engine, queue, owners, { kept, taken, vmm, power });
  return { engine, queue, session, keeper, blobs, doors, power, freeze, state };
}

/** Which commands are audited: asked when the one that runs is done, and who waits for its answer has it. */
function askForAudits(
  question: number,
  queue: CommandQueue,
  keeper: CheckpointKeeper,
  events: ServedTpmEvents,
): void {
  const ask = async (): Promise<void> => {
    await queue.whenIdle();
    await setImmediate();
    keeper.noEffect.answered(question, await runOwnCommand(queue, getCapability(CAP_AUDIT_COMMANDS, 0, 256)));
  };
  ask().catch((error: unknown) => events.failed(error));
}
