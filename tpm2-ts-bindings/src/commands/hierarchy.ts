import { tpm2b, u32, yesNo } from '../codec.js';
import { command } from '../command.js';
import { Rh } from '../constants.js';

/** Part 3, section 24: hierarchies. CreatePrimary is with the objects. */

/** Switches a hierarchy on or off until the next start-up. */
export const HierarchyControl = command('HierarchyControl', {
  code: 0x121,
  handles: ['!authHandle'],
  params: { enable: u32, state: yesNo },
});

/** The answer is proved with the new authValue (24.8.1). */
export const HierarchyChangeAuth = command('HierarchyChangeAuth', {
  code: 0x129,
  handles: ['!authHandle'],
  params: { newAuth: tpm2b },
  newAuth: ({ newAuth }) => newAuth,
});

/** Everything of the owner goes, and the authValue of the lockout hierarchy with it (24.6.1). */
export const Clear = command('Clear', {
  code: 0x126,
  handles: ['!authHandle'],
  newAuth: (_, first) => (first?.handle === Rh.LOCKOUT ? new Uint8Array(0) : undefined),
});

export const ClearControl = command('ClearControl', {
  code: 0x127,
  handles: ['!auth'],
  params: { disable: yesNo },
});
