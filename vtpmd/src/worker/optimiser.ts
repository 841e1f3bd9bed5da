import { setFlagsFromString } from 'node:v8';

/** What V8 has where nobody says anything else. */
const USUAL_BYTES = 60 * 1024;

/**
 * Lets V8 compile anew what runs often, as it usually does. A worker is started with a limit of 0 bytes (its image's
 * `nodeArguments`): what runs often before there is a guest is the opening of one box, and to compile that took ten milliseconds
 * on other threads, which the manager and the supervisor lacked in the midst of a start. The limit is asked for at each
 * decision, so it can be changed.
 */
export function optimise(): void {
  setFlagsFromString(`--max-optimized-bytecode-size=${USUAL_BYTES}`);
}
