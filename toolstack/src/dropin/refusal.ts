/**
 * Why a drop-in command does not do what it was asked. The message is one sentence that says what to do instead; the
 * command's name stands before it on standard error, and the exit status is 1, as swtpm's own commands have it.
 */
export class DropinRefusal extends Error {
  override readonly name = 'DropinRefusal';
}
