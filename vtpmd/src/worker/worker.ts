import { closeSync } from 'node:fs';
import { Socket } from 'node:net';
import type { Duplex } from 'node:stream';
import { forbidCoreDumps, sendDescriptor, socketPair } from 'vtpm-common/libc';
import { type Left, openLeft } from '../checkpoint/left.js';
import { loadLibtpms } from '../engine/libtpms.js';
import { VtpmdError } from '../error.js';
import { readIdentity } from '../manager-link/load.js';
import { LoadKeys } from '../manager-link/load-keys.js';
import { type ManagerLink, openManagerLink } from '../manager-link/manager-link.js';
import {
  type CheckpointDescriptors,
  type ControlChannel,
  openControlChannel,
  type PipeEnds,
  type SupervisorMessage,
} from './control-channel.js';
import { IdleLink } from './idle-link.js';
import { lockDown } from './lock-down.js';
import type { Log } from './log.js';
import { LostTpm } from './lost-tpm.js';
import { optimise } from './optimiser.js';
import { readHoldTimes } from './outage-policy.js';
import { arrive, arriveWithVmm, beginRun, endRun, goOn } from './power.js';
import { type RehearsalStage, rehearse } from './rehearsal.js';
import { type LoadParts, loadTpm, type ServedTpm } from './served-tpm.js';
import { StandIn } from './stand-in.js';
import { Visits } from './visits.js';

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

type StandInMessage = SupervisorMessage & { type: 'stand-in' };

class Worker {
  readonly #log: Log;
  readonly #end: (status: number) => void;
  /** Until there is an identity: the only one that they are used for. */
  #keys: LoadKeys | undefined = new LoadKeys();
  readonly #link: IdleLink;
  readonly #control: ControlChannel;
  readonly #descriptors: number;
  readonly #visits: Visits;
  #tpm: ServedTpm | undefined;
  #rehearsal: Promise<void> | undefined;
  /** After the start none can be made. */
  #stage: RehearsalStage | undefined;
  #lost: LostTpm | undefined;
  #standIn: StandIn | undefined;
  /** What it has of the VM run; with an identity all of that comes again. */
  #standInPipes: PipeEnds[] = [];
  #isEnding = false;
  #hasFailed = false;

  constructor(ends: WorkerEnds, log: Log, end: (status: number) => void) {
    this.#log = log;
    this.#end = end;
    this.#descriptors = ends.descriptors;
    this.#link = new IdleLink(ends.manager, {
      lost: () => this.#control.send({ type: 'link-lost', message: 'the link to the manager broke' }),
      up: () => this.#control.send({ type: 'link-up' }),
    });
    this.#control = openControlChannel(ends, {
      onMessage: (message) => this.#onMessage(message),
      onError: (error) => this.#fail(error),
      onEnd: () => this.#end(2),
    });
    this.#visits = new Visits(this.#control, log);
  }

  start(isLocked: boolean): void {
    // Ready means that nothing but the identity is missing.
    const { version } = loadLibtpms();
    this.#stage = socketPair();
    if (isLocked) lockDown();
    const publicKey = Buffer.from(this.#keys?.publicKey ?? []).toString('hex');
    this.#control.send({ type: 'ready', publicKey, libtpms: version });
  }

  /** They are for one identity. @throws VtpmdError `protocol` */
  #takeKeys(): LoadKeys {
    const keys = this.#keys;
    if (!keys) throw new VtpmdError('protocol', 'a second identity');
    this.#keys = undefined;
    const stage = this.#takeStage();
    if (stage) for (const fd of stage) closeSync(fd);
    return keys;
  }

  #beginServing(fields: Record<string, unknown>, left: Left | undefined): void {
    const keys = this.#takeKeys();
    const link = this.#link.take();
    const parts = { identity: readIdentity(fields), holdTimes: readHoldTimes(fields.outage), left };
    this.#serve(parts, keys, link).catch((error: unknown) => this.#fail(error));
  }

  #onMessage(message: SupervisorMessage): void {
    switch (message.type) {
      case 'identity':
        this.#endStandIn();
        this.#beginServing(message.fields, openLeft(message.checkpoint));
        return;
      case 'lost':
        this.#takeKeys().wipe();
        this.#link.take();
        this.#beLost(openLeft(message.checkpoint)).catch((error: unknown) => this.#fail(error));
        return;
      case 'stand-in':
        this.#standInFor(message).catch((error: unknown) => this.#fail(error));
        return;
      case 'no-tpm':
        this.#standIn?.refuse(message.message);
        return;
      case 'rehearse':
        this.#rehearse(message.checkpoint);
        if (message.managerKey) this.#keys?.agree(message.managerKey);
        return;
      case 'link':
        this.#useLink(message.fd);
        return;
      case 'connection':
        this.#visits.open(message);
        return;
      case 'peer-gone':
        this.#tpm?.doors.peerGone(message.peer);
        return;
      case 'no-data-channel':
        this.#visits.host?.dataChannelRefused();
        return;
      case 'no-vm-reset':
        this.#lost?.resetRefused();
        return;
      case 'stop':
        this.#stop().catch((error: unknown) => this.#fail(error));
        return;
    }
  }

  #rehearse(checkpoint: CheckpointDescriptors | undefined): void {
    const stage = this.#takeStage();
    if (!stage) throw new VtpmdError('protocol', 'a second rehearsal, or one after the identity');
    this.#rehearsal = rehearse(stage, checkpoint).then(
      () => this.#control.send({ type: 'rehearsed' }),
      (error: unknown) => this.#fail(error),
    );
  }

  #takeStage(): RehearsalStage | undefined {
    const stage = this.#stage;
    this.#stage = undefined;
    return stage;
  }

  #useLink(fd: number): void {
    if (this.#tpm) this.#tpm.session.attach(openManagerLink(new Socket({ fd })));
    else this.#link.replace(fd);
  }

  #sendDataChannel(fd: number): void {
    sendDescriptor(this.#descriptors, fd);
    this.#control.send({ type: 'data-channel' });
  }

  async #beLost(left: Left | undefined): Promise<void> {
    if (!left) throw new VtpmdError('protocol', 'nothing is left of a worker before this one');
    const visitors = await this.#visits.inherit(left);
    this.#lost = new LostTpm(left, {
      dataChannel: (fd) => this.#sendDataChannel(fd),
      vmmChanged: (status) => this.#control.send({ type: 'vmm', ...status }),
      vmmShutDown: () => this.#control.send({ type: 'vmm-shut-down' }),
      vmReset: (chosen) => this.#control.send({ type: 'vm-reset', ...chosen }),
      failed: (error) => this.#fail(error),
      log: this.#log,
    });
    this.#lost.adopt(visitors, this.#visits.closed);
    this.#visits.host = this.#lost;
    this.#log('warn', 'every command is answered with TPM_RC_FAILURE');
    this.#control.send({ type: 'lost' });
  }

  #endStandIn(): void {
    this.#standIn?.leave();
    this.#standIn = undefined;
    for (const { read, write } of this.#standInPipes.splice(0)) {
      closeSync(read);
      closeSync(write);
    }
    this.#visits.host = undefined;
  }

  async #standInFor({ kind, bufferSize, refused, outage, checkpoint }: StandInMessage): Promise<void> {
    const left = openLeft(checkpoint);
    const { pipe, controlPipe } = checkpoint;
    this.#standInPipes = controlPipe ? [pipe, controlPipe] : [pipe];
    const { power: holdMs } = readHoldTimes(outage);
    const visitors = await this.#visits.inherit(left);
    this.#standIn = new StandIn(
      left,
      { kind, bufferSize, refused, holdMs },
      {
        dataChannel: (fd) => this.#sendDataChannel(fd),
        vmmChanged: (status) => this.#control.send({ type: 'vmm', ...status }),
        vmmShutDown: () => this.#control.send({ type: 'vmm-shut-down' }),
        vmmCalls: (call) => this.#control.send({ type: 'vmm-calls', ...call }),
        failed: (error) => this.#fail(error),
        log: this.#log,
      },
    );
    this.#standIn.adopt(visitors, this.#visits.closed);
    this.#visits.host = this.#standIn;
    this.#control.send({ type: 'standing-in' });
  }

  async #serve(parts: LoadParts, keys: LoadKeys, link: ManagerLink): Promise<void> {
    const { identity, left } = parts;
    const inherited = left?.resumes && this.#visits.inherit(left);
    // A process has one TPM at a time.
    await this.#rehearsal;
    const { tpm, epoch, chosen, hasArrived } = await loadTpm(link, keys, parts, {
      linkUp: () => this.#control.send({ type: 'link-up' }),
      linkLost: (error) => {
        this.#log('warn', 'the manager is away: nothing can be saved', { reason: error.reason });
        this.#control.send({ type: 'link-lost', message: error.message });
      },
      failed: (error) => this.#fail(error),
      dataChannel: (fd) => this.#sendDataChannel(fd),
      vmmChanged: (status) => this.#control.send({ type: 'vmm', ...status }),
      vmmShutDown: () => this.#control.send({ type: 'vmm-shut-down' }),
      log: this.#log,
    });
    this.#tpm = tpm;
    const onClosed = this.#visits.closed;
    if (chosen && inherited && left) await goOn(tpm, chosen, await inherited, left, onClosed);
    else if (hasArrived) await arrive(tpm, await inherited, onClosed);
    else if (identity.arrives && inherited && left)
      arriveWithVmm(tpm, await inherited, left, onClosed, this.#log);
    else await beginRun(tpm, identity);
    this.#visits.host = tpm.doors;
    const { generation } = tpm.session;
    this.#control.send({ type: 'serving', epoch: Number(epoch), generation: Number(generation) });
    this.#log('info', 'serving', { epoch: Number(epoch), generation: Number(generation) });
    optimise();
  }

  async #stop(): Promise<void> {
    if (this.#isEnding) return;
    this.#isEnding = true;
    if (this.#tpm) await endRun(this.#tpm, this.#log);
    this.#log('info', 'stopped');
    this.#control.send({ type: 'stopped' }, () => this.#end(0));
  }

  #fail(unknown: unknown): void {
    this.#tpm?.queue.kill();
    if (this.#hasFailed) return;
    this.#hasFailed = true;
    const error = VtpmdError.from(unknown);
    this.#log('error', error.message, { reason: error.reason });
    this.#control.send({ type: 'failed', reason: error.reason, message: error.message }, () => this.#end(1));
  }
}
