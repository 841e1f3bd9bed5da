import { u32 } from '../codec.js';
import { command } from '../command.js';
import { tpmsContext } from '../structures.js';

/** Part 3, section 28: what is loaded and what stays. */

/** An object stays loaded; a session is only in the context afterwards, and keeps its handle. */
export const ContextSave = command('ContextSave', {
  code: 0x162,
  handles: ['saveHandle'],
  result: { context: tpmsContext },
});

export const ContextLoad = command('ContextLoad', {
  code: 0x161,
  params: { context: tpmsContext },
  resultHandles: ['loadedHandle'],
});

/** Removes an object or session from the TPM's memory. The handle is a parameter: it cannot be authorised. */
export const FlushContext = command('FlushContext', { code: 0x165, params: { flushHandle: u32 } });

/** Makes an object persistent, or with a persistent `objectHandle` removes it. */
export const EvictControl = command('EvictControl', {
  code: 0x120,
  handles: ['!auth', 'objectHandle'],
  params: { persistentHandle: u32 },
});
