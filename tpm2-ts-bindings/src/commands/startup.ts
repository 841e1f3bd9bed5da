import { u16, yesNo } from '../codec.js';
import { command } from '../command.js';

/** Part 3, sections 9 and 10: start-up and testing. */

export const Startup = command('Startup', { code: 0x144, params: { startupType: u16 } });
export const Shutdown = command('Shutdown', { code: 0x145, params: { shutdownType: u16 } });
export const SelfTest = command('SelfTest', { code: 0x143, params: { fullTest: yesNo } });
