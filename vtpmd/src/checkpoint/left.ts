import { closeSync } from 'node:fs';
import type { Visitor } from '../channels/doors.js';
import type { CheckpointDescriptors } from '../worker/control-channel.js';
import { AnswerPipe } from './answer-pipe.js';
import type { ChosenUnit, GrantedState } from './choose.js';
import type { KeeperParts } from './keeper.js';
import { CheckpointMemory } from './memory.js';

/** What a VM run has beside its workers. */
export interface Left {
  readonly memory: CheckpointMemory;
  readonly pipe: AnswerPipe;
  /** For answers to control requests, where the vTPM has that door. */
  readonly controlPipe: AnswerPipe | undefined;
  readonly keeps: boolean;
  readonly resumes: CheckpointDescriptors['resumes'];
}

/** What a worker begins with. */
export interface Checkpoint {
  readonly left: Left;
  readonly chosen: ChosenUnit | undefined;
  readonly granted: GrantedState;
}

/** The memory's descriptor is closed, the pipe's stay. @throws VtpmdError `internal` */
export function openLeft(descriptors: CheckpointDescriptors): Left;
export function openLeft(descriptors: CheckpointDescriptors | undefined): Left | undefined;
export function openLeft(descriptors: CheckpointDescriptors | undefined): Left | undefined {
  if (!descriptors) return undefined;
  const { memory: fd, pipe, controlPipe, keeps, resumes } = descriptors;
  const memory = CheckpointMemory.map(fd);
  closeSync(fd);
  return {
    memory,
    pipe: new AnswerPipe(memory.marks, pipe),
    controlPipe: controlPipe && new AnswerPipe(memory.controlMarks, controlPipe),
    ...{ keeps, resumes },
  };
}

/** Numbers go on behind everything that was numbered, whether it is used or not. */
export function lastOf({ left, chosen }: Checkpoint): KeeperParts['last'] {
  const { marks, controlMarks } = left.memory;
  const sequence = Math.max(left.resumes?.newest ?? 0, marks.mark().begun, controlMarks.mark().begun);
  return { sequence, unit: chosen?.unit.sequence ?? 0, inUse: chosen?.inUse ?? [] };
}

/** Gathers connections until all are there. */
export class Inherited {
  readonly all: Promise<readonly Visitor[]>;
  readonly #visitors: Visitor[] = [];
  readonly #count: number;
  #done: (visitors: readonly Visitor[]) => void = () => {};

  constructor(count: number) {
    this.#count = count;
    this.all = new Promise((resolve) => {
      this.#done = resolve;
    });
    if (count === 0) this.#done(this.#visitors);
  }

  open(visitor: Visitor): void {
    this.#visitors.push(visitor);
    if (this.#visitors.length === this.#count) this.#done(this.#visitors);
  }
}
