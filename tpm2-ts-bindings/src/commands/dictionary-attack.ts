import { u32 } from '../codec.js';
import { command } from '../command.js';

/** Part 3, section 25: protection against guessing authValues. */

export const DictionaryAttackLockReset = command('DictionaryAttackLockReset', {
  code: 0x139,
  handles: ['!lockHandle'],
});

/**
 * `newRecoveryTime`: seconds after which one failure is forgotten. `lockoutRecovery`: seconds for the lockout
 * hierarchy.
 */
export const DictionaryAttackParameters = command('DictionaryAttackParameters', {
  code: 0x13a,
  handles: ['!lockHandle'],
  params: { newMaxTries: u32, newRecoveryTime: u32, lockoutRecovery: u32 },
});
