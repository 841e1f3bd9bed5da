import { appendFileSync, closeSync, openSync, writeSync } from 'node:fs';
import { DropinRefusal } from './refusal.js';
import type { Destination } from './swtpm-arguments.js';

/** Where a drop-in command says what it does: the log that the caller named, and standard error for what went wrong. */
export class Report {
  readonly #command: string;
  #write: ((line: string) => void) | undefined;

  /** @param command whose name stands before what it says */
  constructor(command: string) {
    this.#command = command;
  }

  /** @throws DropinRefusal where the log cannot be opened */
  logTo(log: Destination & { readonly truncates?: boolean; readonly prefix?: string }): void {
    const { prefix = '' } = log;
    if ('fd' in log) {
      this.#write = (line) => void writeSync(log.fd, `${prefix}${line}\n`);
      return;
    }
    try {
      closeSync(openSync(log.path, log.truncates === true ? 'w' : 'a', 0o640));
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException;
      throw new DropinRefusal(`the log ${log.path} cannot be written (${code})`);
    }
    this.#write = (line) => appendFileSync(log.path, `${prefix}${line}\n`);
  }

  note(text: string): void {
    try {
      this.#write?.(`${new Date().toISOString()} ${text}`);
    } catch {
      // A log that is full does not end a TPM.
    }
  }

  /** @returns the exit status */
  failed(error: unknown): number {
    const text = error instanceof DropinRefusal ? error.message : String((error as Error)?.stack ?? error);
    this.note(text);
    process.stderr.write(`${this.#command}: ${text}\n`);
    return 1;
  }
}
