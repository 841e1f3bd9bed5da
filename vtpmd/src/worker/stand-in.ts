import { closeSync } from 'node:fs';
import type { Visitor } from '../channels/doors.js';
import type { Left } from '../checkpoint/left.js';
import type { Actions, VmmState } from '../control/actions.js';
import { controlNumbers } from '../control/control-numbers.js';
import type { DataChannel } from '../control/data-channel.js';
import { awayActions, incomingActions } from '../control/stand-in-actions.js';
import { StandInData } from '../control/stand-in-data.js';
import { VmmDoors, type VmmStatus } from '../control/vmm-doors.js';
import { createLibtpmsEngine } from '../engine/libtpms-engine.js';
import { VtpmdError } from '../error.js';
import type { Log } from './log.js';

/** `away`: the TPM that was here is on its way to another host. `incoming`: one is to come with its VMM. */
export type StandInKind = 'away' | 'incoming';

/** Why the VMM needs the TPM now, and what it has chosen for it. */
export interface VmmCall {
  /** A control request, or `command` for one of the guest's. */
  readonly request: string;
  /** Of the reference that the VMM brought, 32 bytes in hex. */
  readonly referenceDigest: string | null;
  readonly bufferSize: number;
  readonly locality: number;
}

export interface StandInParts {
  readonly kind: StandInKind;
  /** That the VMM chose; 0 where it has not. */
  readonly bufferSize: number;
  /** Why the INIT that is in the socket is not done; undefined where it may be. */
  readonly refused: string | undefined;
  /** Milliseconds that a VMM stands still at most for a TPM that is away. */
  readonly holdMs: number;
}

export interface StandInEvents {
  /** A VMM gave this as its data channel. */
  dataChannel(fd: number): void;
  vmmChanged(status: VmmStatus): void;
  /** The VMM needs this TPM no more. */
  vmmShutDown(): void;
  /** The VMM needs the TPM now: `leave`, `refuse`, or the end of this worker follows. Said again until then. */
  vmmCalls(call: VmmCall): void;
  /** It must not go on. */
  failed(error: unknown): void;
  readonly log: Log;
}

const CALL_PAUSE_MS = 1000;
const COMMAND = 'command';

/**
 * Holds the two connections of a VMM whose TPM is on its way from or to another host. There is no state here, and no command
 * runs. What needs the TPM stays in its socket: whoever comes with the TPM, this process or another, finds it there.
 */
export class StandIn {
  readonly #left: Left;
  readonly #parts: StandInParts;
  readonly #events: StandInEvents;
  readonly #engine = createLibtpmsEngine();
  readonly #vmm: VmmDoors;
  #data: StandInData | undefined;
  #calling: NodeJS.Timeout | undefined;
  readonly #refusals = new Set<(error: VtpmdError) => void>();

  /** @throws VtpmdError `protocol` where the vTPM has no VMM */
  constructor(left: Left, parts: StandInParts, events: StandInEvents) {
    const { memory, controlPipe: pipe } = left;
    if (!pipe) throw new VtpmdError('protocol', 'nobody stands in where there is no VMM');
    this.#left = left;
    this.#parts = parts;
    this.#events = events;
    if (parts.bufferSize > 0) this.#engine.setBufferSize(parts.bufferSize);
    this.#vmm = new VmmDoors({
      actions: (vmm, data) => this.#actions(vmm, data),
      isOn: () => this.#isOn,
      perform: async (step) => {
        await step.run(() => {});
        step.done?.();
      },
      ...{ memory, pipe, log: events.log },
      numbers: controlNumbers(memory.controlMarks),
      bufferSize: () => this.#engine.bufferSizes.size,
      offer: (fd) => events.dataChannel(fd),
      // No command was taken.
      dropGone: () => {},
      status: (status) => events.vmmChanged(status),
      shutDown: () => events.vmmShutDown(),
      failed: (error) => events.failed(error),
    });
  }

  /** Connections that were open when the worker before this one ended. */
  adopt(visitors: readonly Visitor[], onClosed: (id: number) => void): void {
    this.#left.controlPipe?.finish((connection) => visitors.find(({ id }) => id === connection)?.fd);
    for (const visitor of visitors) this.open(visitor, () => onClosed(visitor.id));
    this.#vmm.adopted();
  }

  open({ kind, id, fd }: Visitor, onClosed: () => void): void {
    if (kind === 'control') {
      this.#vmm.control.open(id, fd, onClosed);
    } else if (kind === 'vmm-data') {
      this.#data = new StandInData(fd, {
        isOn: () => this.#isOn,
        command: () => void this.#ask(COMMAND).catch(() => undefined),
        onClosed: (connection) => {
          this.#vmm.data.closed(connection);
          onClosed();
        },
      });
      this.#vmm.data.opened(this.#data);
    } else {
      closeSync(fd);
      onClosed();
    }
  }

  dataChannelRefused(): void {
    this.#vmm.data.refused();
  }

  /** The TPM does not come: what the VMM waits for is not done. */
  refuse(message: string): void {
    this.#endCall();
    for (const refuse of this.#refusals) refuse(new VtpmdError('tpm-away', message));
    this.#refusals.clear();
  }

  /** Another worker has the connections: nothing is taken from them here any more. */
  leave(): void {
    this.#endCall();
    this.#vmm.release();
    this.#data?.release();
    // A process has one TPM at a time.
    this.#engine.terminate();
  }

  get #isOn(): boolean {
    return this.#parts.kind === 'away' && !this.#left.memory.isSwitchedOff;
  }

  #actions(vmm: VmmState, data: DataChannel): Actions {
    const parts = {
      ...{ vmm, data, memory: this.#left.memory, engine: this.#engine },
      isOn: () => this.#isOn,
      call: (request: string, digest?: Buffer) => this.#ask(request, digest),
    };
    if (this.#parts.kind === 'incoming') return incomingActions(parts, this.#parts.refused);
    return awayActions({ ...parts, switchedOff: () => this.#data?.lookAgain() });
  }

  /** Rejects where the TPM does not come, or a VMM cannot stand still any longer. */
  #ask(request: string, digest?: Buffer): Promise<never> {
    const referenceDigest = digest?.toString('hex') ?? null;
    const say = (): void => {
      const { size: bufferSize } = this.#engine.bufferSizes;
      const { locality } = this.#left.memory;
      this.#events.vmmCalls({ request, referenceDigest, bufferSize, locality });
    };
    this.#endCall();
    // The supervisor may be upgrading: it does not hear everything.
    this.#calling = setInterval(say, CALL_PAUSE_MS);
    say();
    return new Promise<never>((_, refuse) => {
      this.#refusals.add(refuse);
      // A command of the guest's waits as long as it takes, and so does a VM that is to begin here.
      if (request === COMMAND || this.#parts.kind === 'incoming') return;
      setTimeout(() => {
        if (this.#refusals.delete(refuse)) refuse(new VtpmdError('tpm-away', NOT_YET));
      }, this.#parts.holdMs).unref();
    });
  }

  #endCall(): void {
    clearInterval(this.#calling);
    this.#calling = undefined;
  }
}

const NOT_YET =
  'the TPM is on its way to another host, and it is not known yet whether it comes back; try again';
