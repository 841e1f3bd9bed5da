import { tpm2b, u16 } from '../codec.js';
import { command } from '../command.js';
import { tpm2bNvPublic } from '../structures.js';

/** Part 3, section 31: non-volatile storage. The content of an index is a sized first parameter: encryptable. */

export const NV_DefineSpace = command('NV_DefineSpace', {
  code: 0x12a,
  handles: ['!authHandle'],
  params: { auth: tpm2b, publicInfo: tpm2bNvPublic },
});

export const NV_UndefineSpace = command('NV_UndefineSpace', {
  code: 0x122,
  handles: ['!authHandle', 'nvIndex'],
});

export const NV_ReadPublic = command('NV_ReadPublic', {
  code: 0x169,
  handles: ['nvIndex'],
  result: { nvPublic: tpm2bNvPublic, nvName: tpm2b },
});

export const NV_Write = command('NV_Write', {
  code: 0x137,
  handles: ['!authHandle', 'nvIndex'],
  params: { data: tpm2b, offset: u16 },
});

export const NV_Increment = command('NV_Increment', { code: 0x134, handles: ['!authHandle', 'nvIndex'] });

export const NV_Read = command('NV_Read', {
  code: 0x14e,
  handles: ['!authHandle', 'nvIndex'],
  params: { size: u16, offset: u16 },
  result: { data: tpm2b },
});
