/**
 * `instanceof`, by name. Mocha loads test files by Node's require() of ES modules, and once in some twenty runs a class is
 * there twice in a process then.
 */
export function isA<E extends Error>(error: unknown, type: abstract new (...args: never[]) => E): error is E {
  return (error as { name?: unknown } | undefined)?.name === type.name;
}
