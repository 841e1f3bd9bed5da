const HOOK = Symbol.for('vtpm.barrier');

/**
 * Names a point where a crash is tested. Does nothing unless a fault test has put a function under
 * `Symbol.for('vtpm.barrier')` before the program started.
 */
export function barrier(name: string): void {
  (globalThis as { [HOOK]?: (name: string) => void })[HOOK]?.(name);
}
