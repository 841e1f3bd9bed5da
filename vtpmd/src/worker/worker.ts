import { hash } from 'node:crypto';
import { closeSync } from 'node:fs';
import { Socket } from 'node:net';
import type { Duplex } from 'node:stream';
import { forbidCoreDumps, pipePair, socketPair } from 'vtpm-common/libc';
import { type BoxKeyPair, boxKeyPair, type LoadGrant } from 'vtpm-proto';
import { Doors, isDoorKind, type Visitor } from '../channels/doors.js';
import { HandleOwners } from '../channels/handle-owners.js';
import { type ChosenUnit, chooseUnit } from '../checkpoint/choose.js';
import { CheckpointKeeper } from '../checkpoint/keeper.js';
import { type Checkpoint, Inherited, type Left, lastOf, openLeft } from '../checkpoint/left.js';
import { endWhatWasGoingOn } from '../checkpoint/resume.js';
import { UnitSealer } from '../checkpoint/unit.js';
import {
  CAP_AUDIT_COMMANDS,
  getCapability,
  responseCode,
  shutdownClear,
  startupClear,
  TPM_RC_SUCCESS,
} from '../engine/command.js';
import { startEngine, type TpmEngine } from '../engine/engine.js';
import { loadLibtpms } from '../engine/libtpms.js';
import { VtpmdError } from '../error.js';
import { type Identity, loadVtpm, readIdentity } from '../manager-link/load.js';
import { type ManagerLink, openManagerLink } from '../manager-link/manager-link.js';
import { SaveSession } from '../manager-link/save-session.js';
import { CommandQueue } from './command-queue.js';
import { type ControlChannel, openControlChannel, type SupervisorMessage } from './control-channel.js';
import { lockDown } from './lock-down.js';
import type { Log } from './log.js';
import { LostTpm } from './lost-tpm.js';
import { type HoldTimes, OutagePolicy, readHoldTimes } from './outage-policy.js';
import { runOwnCommand } from './own-command.js';
import { type RehearsalStage, rehearse } from './rehearsal.js';
import { expectStirred, freshStir } from './trial.js';

/** What a worker is connected to its surroundings by, when it starts. It opens nothing itself. */
export interface WorkerEnds {
  readonly manager: number;
  readonly control: number | Duplex;
  readonly descriptors: number;
}

/** All of them inherited. */
export interface WorkerDescriptors extends WorkerEnds {
  readonly control: number;
}

/**
 * Runs the worker of one vTPM until the supervisor stops it or it must not go on. Ends the process: 0 after a stop,
 * 1 after a failure that was reported, 2 where the supervisor is gone.
 * @param isLocked false only where the supervisor was told to do without
 */
export function runWorker(
  ends: WorkerEnds,
  log: Log,
  isLocked: boolean,
  end: (status: number) => void = (status) => process.exit(status),
): void {
  forbidCoreDumps();
  const worker = new Worker(ends, log, end);
  worker.start(isLocked);
}

class Worker {
  readonly #log: Log;
  readonly #end: (status: number) => void;
  /** Until there is an identity: the only one that they are used for. */
  #keys: BoxKeyPair | undefined = boxKeyPair();
  #link: ManagerLink;
  readonly #control: ControlChannel;
  #serving: Serving | undefined;
  #rehearsal: Promise<void> | undefined;
  /** After the start none can be made. */
  #stage: RehearsalStage | undefined;
  #lost: LostTpm | undefined;
  /** Connections that the worker before this one had. */
  #inherited: Inherited | undefined;
  #isOpen = false;
  #isEnding = false;
  #hasFailed = false;

  constructor(ends: WorkerEnds, log: Log, end: (status: number) => void) {
    this.#log = log;
    this.#end = end;
    this.#link = this.#openIdleLink(ends.manager);
    this.#control = openControlChannel(ends, {
      onMessage: (message) => this.#onMessage(message),
      onError: (error) => this.#fail(error),
      onEnd: () => this.#end(2),
    });
  }

  start(isLocked: boolean): void {
    // Ready means that nothing but the identity is missing.
    const { version } = loadLibtpms();
    this.#stage = { door: socketPair(), pipe: pipePair() };
    if (isLocked) lockDown();
    const publicKey = Buffer.from(this.#keys?.publicKey ?? []).toString('hex');
    this.#control.send({ type: 'ready', publicKey, libtpms: version });
  }

  /** They are for one identity. @throws VtpmdError `protocol` */
  #takeKeys(): BoxKeyPair {
    const keys = this.#keys;
    if (!keys) throw new VtpmdError('protocol', 'a second identity');
    this.#keys = undefined;
    const stage = this.#takeStage();
    if (stage) for (const fd of [...stage.door, stage.pipe.read, stage.pipe.write]) closeSync(fd);
    return keys;
  }

  #beginServing(fields: Record<string, unknown>, left: Left | undefined): void {
    const keys = this.#takeKeys();
    this.#serve(readIdentity(fields), readHoldTimes(fields.outage), keys, left).catch((error: unknown) =>
      this.#fail(error),
    );
  }

  #onMessage(message: SupervisorMessage): void {
    switch (message.type) {
      case 'identity':
        this.#beginServing(message.fields, openLeft(message.checkpoint));
        return;
      case 'lost':
        this.#takeKeys().secretKey.fill(0);
        this.#beLost(openLeft(message.checkpoint)).catch((error: unknown) => this.#fail(error));
        return;
      case 'rehearse':
        this.#rehearse();
        return;
      case 'link':
        this.#useLink(message.fd);
        return;
      case 'connection':
        this.#openDoor(message);
        return;
      case 'peer-gone':
        this.#serving?.doors.peerGone(message.peer);
        return;
      case 'stop':
        this.#stop().catch((error: unknown) => this.#fail(error));
        return;
    }
  }

  #rehearse(): void {
    const stage = this.#takeStage();
    if (!stage) throw new VtpmdError('protocol', 'a second rehearsal, or one after the identity');
    this.#rehearsal = rehearse(loadLibtpms().version, stage).then(
      () => this.#control.send({ type: 'rehearsed' }),
      (error: unknown) => this.#fail(error),
    );
  }

  #takeStage(): RehearsalStage | undefined {
    const stage = this.#stage;
    this.#stage = undefined;
    return stage;
  }

  /** A link on which there is nothing to do yet. It may be lost, and another take its place, any number of times. */
  #openIdleLink(fd: number): ManagerLink {
    const link = openManagerLink(new Socket({ fd }));
    void link.closed.then(() => {
      // Who waits for an answer on it sees the loss himself.
      if (link === this.#link && this.#keys) {
        this.#control.send({ type: 'link-lost', message: 'the link to the manager broke' });
      }
    });
    return link;
  }

  #useLink(fd: number): void {
    if (this.#serving) {
      this.#serving.session.attach(openManagerLink(new Socket({ fd })));
    } else if (!this.#keys) {
      // The Load on the link before fails by itself, and the worker with it.
      closeSync(fd);
    } else {
      const link = this.#openIdleLink(fd);
      this.#link.close();
      this.#link = link;
      void link.greeted.then(() => {
        if (link === this.#link && this.#keys) this.#control.send({ type: 'link-up' });
      });
    }
  }

  #openDoor({ door, id, peer, fd }: SupervisorMessage & { type: 'connection' }): void {
    const target = this.#isOpen ? (this.#lost ?? this.#serving?.doors) : this.#inherited;
    if (!target || !isDoorKind(door)) {
      closeSync(fd);
      this.#log('warn', 'a connection was refused', { door, id });
      this.#control.send({ type: 'connection-closed', id });
      return;
    }
    target.open({ kind: door, id, fd, peer }, () => this.#closed(id));
  }

  #closed(id: number): void {
    this.#control.send({ type: 'connection-closed', id });
  }

  /** Resolves with all connections of the worker before this one. */
  async #inherit(left: Left): Promise<readonly Visitor[]> {
    this.#inherited = new Inherited(left.resumes?.connections ?? 0);
    const visitors = await this.#inherited.all;
    this.#inherited = undefined;
    return visitors;
  }

  async #beLost(left: Left | undefined): Promise<void> {
    if (!left) throw new VtpmdError('protocol', 'nothing is left of a worker before this one');
    const visitors = await this.#inherit(left);
    this.#lost = new LostTpm();
    this.#lost.adopt(visitors, left, (id) => this.#closed(id));
    this.#isOpen = true;
    this.#log('warn', 'every command is answered with TPM_RC_FAILURE');
    this.#control.send({ type: 'lost' });
  }

  async #serve(
    identity: Identity,
    holdTimes: HoldTimes,
    keys: BoxKeyPair,
    left: Left | undefined,
  ): Promise<void> {
    const inherited = left?.resumes && this.#inherit(left);
    // A process has one TPM at a time.
    await this.#rehearsal;
    const grant = await loadVtpm(this.#link, identity, keys, loadLibtpms().version);
    keys.secretKey.fill(0);
    const granted = {
      generation: grant.generation,
      permanentDigest: hash('sha256', grant.permanent, 'buffer'),
    };
    const chosen =
      left?.resumes && chooseUnit(left.memory, grant.checkpointKey, identity, left.resumes.newest, granted);
    const engine = startEngine({
      permanent: grant.manufacture ? undefined : grant.permanent,
      volatile: chosen?.unit.volatile,
      manufacture: grant.manufacture,
    });
    if (chosen && engine.storedAtStart && !engine.storedAtStart.equals(grant.permanent)) {
      throw new VtpmdError('no-checkpoint', 'libtpms changed the permanent state that it was given back');
    }
    const serving = this.#compose(grant, identity, holdTimes, engine, left && { left, chosen, granted });
    grant.permanent.fill(0);
    grant.sessionKey.fill(0);
    grant.checkpointKey.fill(0);
    serving.session.attach(this.#link);
    if (chosen && inherited && left) await this.#goOn(serving, chosen, await inherited, left);
    else await this.#powerOn(serving, identity.startup);
    this.#isOpen = true;
    const { epoch } = grant;
    const { generation } = serving.session;
    this.#log('info', 'serving', { epoch: Number(epoch), generation: Number(generation) });
    this.#control.send({ type: 'serving', epoch: Number(epoch), generation: Number(generation) });
  }

  #compose(
    grant: LoadGrant,
    identity: Identity,
    holdTimes: HoldTimes,
    engine: TpmEngine,
    checkpoint: Checkpoint | undefined,
  ): Serving {
    const owners = new HandleOwners();
    const policy = new OutagePolicy(holdTimes, identity.startup === 'none');
    const keeper = checkpoint?.left.keeps
      ? new CheckpointKeeper({
          memory: checkpoint.left.memory,
          sealer: new UnitSealer(grant.checkpointKey, identity, grant.epoch),
          ...{ engine, owners, policy, granted: checkpoint.granted },
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
        if (isLost) this.#control.send({ type: 'link-up' });
        isLost = false;
        queue.outageOver();
        queue.release('link');
      },
      lost: (error) => {
        queue.outage();
        isLost = true;
        this.#log('warn', 'the manager is away: nothing can be saved', { reason: error.reason });
        this.#control.send({ type: 'link-lost', message: error.message });
      },
      over: (error) => this.#fail(error),
      freeze: () => {
        queue.hold('freeze');
        queue.whenIdle().then(
          () => session.frozen(),
          () => {},
        );
      },
      thaw: () => queue.release('freeze'),
    });
    const queue = new CommandQueue({
      engine,
      persist: (permanent) => session.save(permanent),
      observe: (source, command, response) => {
        owners.observe(source.owner, command, response);
        policy.ran(command, response);
      },
      ...(keeper && {
        keep: (source, response, stored) => {
          keeper.keep(source, response, stored);
          if (keeper.noEffect.takeMustAsk()) this.#askForAudits(queue, keeper);
        },
      }),
      policy,
      onFailure: (error) => this.#fail(error),
    });
    // Until the first link is up.
    queue.hold('link');
    const kept = keeper && checkpoint && { keeper, pipe: checkpoint.left.pipe };
    const taken = kept ? undefined : checkpoint?.left.memory.taken;
    this.#serving = {
      engine,
      queue,
      session,
      keeper,
      doors: new Doors(engine, queue, owners, { kept, taken }),
    };
    return this.#serving;
  }

  /** Which commands are audited, as soon as the one that runs is done. */
  #askForAudits(queue: CommandQueue, keeper: CheckpointKeeper): void {
    queueMicrotask(() => {
      runOwnCommand(queue, getCapability(CAP_AUDIT_COMMANDS, 0, 256)).then(
        (response) => keeper.noEffect.answered(response),
        (error: unknown) => this.#fail(error),
      );
    });
  }

  /** From behind the last command of the worker before this one. */
  async #goOn(
    { queue, doors, keeper }: Serving,
    { unit }: ChosenUnit,
    visitors: readonly Visitor[],
    left: Left,
  ): Promise<void> {
    endWhatWasGoingOn(unit, visitors, left);
    unit.volatile.fill(0);
    // The generator stands where it stood at the checkpoint: no random number may come twice.
    expectStirred(await runOwnCommand(queue, freshStir()));
    keeper?.keepNow();
    doors.adopt(visitors, (id) => this.#closed(id));
  }

  /** Resolves when what powering on stored is durable: no guest sees an identity that can vanish. */
  async #powerOn({ engine, queue, session, keeper }: Serving, startup: Identity['startup']): Promise<void> {
    const { generation } = session;
    if (startup === 'clear') {
      const answer = await runOwnCommand(queue, startupClear());
      if (responseCode(answer) !== TPM_RC_SUCCESS) {
        throw new VtpmdError(
          'startup-failed',
          `the TPM answered Startup with 0x${responseCode(answer).toString(16)}`,
        );
      }
    }
    // What Startup stored holds it already.
    if (engine.storedAtStart && session.generation === generation) {
      await session.save(engine.storedAtStart);
      keeper?.saved(engine.storedAtStart, session.generation);
    }
    keeper?.keepNow();
  }

  async #stop(): Promise<void> {
    if (this.#isEnding) return;
    this.#isEnding = true;
    if (this.#serving) {
      const { queue, session } = this.#serving;
      // What clients sent meanwhile must not run after the Shutdown, or that would not have been the last command.
      const answer = await runOwnCommand(queue, shutdownClear(), 'stop');
      const code = responseCode(answer);
      // Nothing is lost by it: state is durable. But the TPM may then count its next start as a wrong authorisation.
      if (code !== TPM_RC_SUCCESS) this.#log('warn', `the TPM answered Shutdown with 0x${code.toString(16)}`);
      session.close();
    }
    this.#log('info', 'stopped');
    this.#control.send({ type: 'stopped' }, () => this.#end(0));
  }

  #fail(unknown: unknown): void {
    this.#serving?.queue.kill();
    if (this.#hasFailed) return;
    this.#hasFailed = true;
    const error = VtpmdError.from(unknown);
    this.#log('error', error.message, { reason: error.reason });
    this.#control.send({ type: 'failed', reason: error.reason, message: error.message }, () => this.#end(1));
  }
}

interface Serving {
  readonly engine: TpmEngine;
  readonly queue: CommandQueue;
  readonly session: SaveSession;
  readonly keeper: CheckpointKeeper | undefined;
  readonly doors: Doors;
}
