import { closeSync } from 'node:fs';
import { TAKEN_FRAMED, type Visitor } from '../channels/doors.js';
import { framed, isFramedAnswer } from '../channels/framing.js';
import { sendNow } from '../channels/socket-io.js';
import { serveTctiControl } from '../channels/tcti-control.js';
import { TpmConnection } from '../channels/tpm-connection.js';
import { type AnswerPipe, takeMarked } from '../checkpoint/answer-pipe.js';
import type { Left } from '../checkpoint/left.js';
import type { CheckpointMemory } from '../checkpoint/memory.js';
import { controlNumbers } from '../control/control-numbers.js';
import { lostActions } from '../control/lost-actions.js';
import { VmmDoors, type VmmStatus } from '../control/vmm-doors.js';
import { errorResponse, TPM_RC_FAILURE } from '../engine/command.js';
import { createLibtpmsEngine } from '../engine/libtpms-engine.js';
import { VtpmdError } from '../error.js';
import { RingConnection } from '../ring/ring-connection.js';
import type { CommandSource } from './command-source.js';
import type { Log } from './log.js';

export interface LostTpmEvents {
  /** A VMM gave this as its data channel. */
  dataChannel(fd: number): void;
  vmmChanged(status: VmmStatus): void;
  /** The VMM needs this TPM no more. */
  vmmShutDown(): void;
  /** The VMM begins a new run of its VM: `resetRefused`, or the end of this worker, follows. */
  vmReset(chosen: { bufferSize: number; locality: number }): void;
  /** It must not go on. */
  failed(error: unknown): void;
  readonly log: Log;
}

const RESET_PAUSE_MS = 1000;

/**
 * In the place of a TPM whose volatile state is lost: every command on every connection, Startup included, is answered with
 * TPM_RC_FAILURE, and there is no state here. A guest that can end its worker must not get fresh PCRs
 * from it; only a new run of its VM brings them.
 */
export class LostTpm {
  readonly #queue = {
    submit: (source: CommandSource): void => source.answer(errorResponse(TPM_RC_FAILURE)),
    cancel: (): boolean => false,
  };
  readonly #left: Left;
  readonly #vmm: VmmDoors | undefined;
  #refuseReset: (() => void) | undefined;

  constructor(left: Left, events: LostTpmEvents) {
    this.#left = left;
    this.#vmm = left.controlPipe && this.#vmmDoors(left.memory, left.controlPipe, events);
  }

  /** Connections that were open when the last worker ended. Some may wait for an answer that is lost too. */
  adopt(visitors: readonly Visitor[], onClosed: (id: number) => void): void {
    const { memory, pipe, controlPipe } = this.#left;
    controlPipe?.finish((connection) => visitors.find(({ id }) => id === connection)?.fd);
    const waiting = this.#waiting(visitors, memory, pipe.drain());
    memory.taken.fill(0);
    for (const { fd, answer } of waiting) sendNow(fd, answer);
    for (const visitor of visitors) this.open(visitor, () => onClosed(visitor.id));
    this.#vmm?.adopted();
  }

  dataChannelRefused(): void {
    this.#vmm?.data.refused();
  }

  /** The supervisor has no other worker for the VM's new run. */
  resetRefused(): void {
    this.#refuseReset?.();
  }

  open({ kind, id, fd }: Visitor, onClosed: () => void): void {
    try {
      switch (kind) {
        case 'tpm':
        case 'tcti':
          new TpmConnection(fd, this.#queue, { onClosed });
          return;
        case 'control':
          if (!this.#vmm) break;
          this.#vmm.control.open(id, fd, onClosed);
          return;
        case 'vmm-data':
          if (!this.#vmm) break;
          this.#openData(this.#vmm, fd, onClosed);
          return;
        case 'tcti-ctrl':
          serveTctiControl(fd, { established: false, cancel: () => {} }, onClosed);
          return;
        case 'ring':
          // Whoever took what stands in its page is gone.
          new RingConnection(fd, { id, queue: this.#queue }, onClosed).start(true);
          return;
      }
      throw new VtpmdError('protocol', `nobody serves the door "${kind}"`);
    } catch {
      closeSync(fd);
      onClosed();
    }
  }

  #openData({ data }: VmmDoors, fd: number, onClosed: () => void): void {
    const connection = new TpmConnection(fd, this.#queue, {
      onClosed: () => {
        data.closed(connection);
        onClosed();
      },
    });
    data.opened(connection);
  }

  #vmmDoors(memory: CheckpointMemory, pipe: AnswerPipe, events: LostTpmEvents): VmmDoors {
    const engine = createLibtpmsEngine();
    const reset = (): Promise<void> => {
      const { locality } = memory;
      const ask = (): void => events.vmReset({ bufferSize: engine.bufferSizes.size, locality });
      // The supervisor may be upgrading: it does not hear everything.
      const again = setInterval(ask, RESET_PAUSE_MS);
      ask();
      return new Promise<void>((resolve) => {
        this.#refuseReset = resolve;
      }).finally(() => clearInterval(again));
    };
    return new VmmDoors({
      actions: (vmm, data) => lostActions({ engine, vmm, data, reset }),
      isOn: () => false,
      perform: async (step) => {
        await step.run(() => {});
        step.done?.();
      },
      ...{ memory, pipe, log: events.log },
      numbers: controlNumbers(memory.controlMarks),
      bufferSize: () => engine.bufferSizes.size,
      offer: (fd) => events.dataChannel(fd),
      // No command waits.
      dropGone: () => {},
      status: (status) => events.vmmChanged(status),
      shutDown: () => events.vmmShutDown(),
      failed: (error) => events.failed(error),
    });
  }

  /** Those whose command was taken from its socket, and has no answer. */
  #waiting(
    visitors: readonly Visitor[],
    memory: CheckpointMemory,
    undelivered: Buffer,
  ): readonly { readonly fd: number; readonly answer: Buffer }[] {
    const failure = errorResponse(TPM_RC_FAILURE);
    const { begun, piped, connection, commandLength } = memory.mark();
    if (undelivered.length > 0 && begun === piped) {
      const visitor = visitors.find(({ id }) => id === connection);
      if (!visitor) return [];
      const { fd } = visitor;
      takeMarked(fd, commandLength);
      return [{ fd, answer: isFramedAnswer(undelivered) ? framed(failure) : failure }];
    }
    const taken = new Set(memory.taken);
    return visitors.flatMap(({ id, fd }) => {
      if (taken.has(id)) return [{ fd, answer: failure }];
      return taken.has((id | TAKEN_FRAMED) >>> 0) ? [{ fd, answer: framed(failure) }] : [];
    });
  }
}
