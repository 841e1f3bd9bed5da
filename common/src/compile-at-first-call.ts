import { setFlagsFromString } from 'node:v8';

/**
 * For a daemon whose answers are waited for: V8 compiles a function by its fast first compiler when it is first called, where
 * it otherwise interprets it until it has run often, which in a manager is after hundreds of starts. Costs some 6 MiB.
 */
export function compileAtFirstCall(): void {
  setFlagsFromString('--always-sparkplug');
}
