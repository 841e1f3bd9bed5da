import type { AnswerNumbers } from '../checkpoint/answer-pipe.js';
import type { PipeMarks } from '../checkpoint/memory.js';

/** Numbers of answers to control requests where nothing is check-pointed: they rise over all workers of the VM run. */
export function controlNumbers(marks: PipeMarks): AnswerNumbers {
  let last = marks.mark().begun;
  return { takeAnswerNumber: () => ++last };
}
