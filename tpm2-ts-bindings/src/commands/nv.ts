import { tpm2b, u16, u64 } from '../codec.js';
import { command } from '../command.js';
import { tpm2bNvPublic, tpmtSignature, tpmtSigScheme } from '../structures.js';

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

/** For an index of type EXTEND: the new content is the hash over the old one and `data`. */
export const NV_Extend = command('NV_Extend', {
  code: 0x136,
  handles: ['!authHandle', 'nvIndex'],
  params: { data: tpm2b },
});

/** For an index of type BITS: the new content is the old one OR `bits`. */
export const NV_SetBits = command('NV_SetBits', {
  code: 0x135,
  handles: ['!authHandle', 'nvIndex'],
  params: { bits: u64 },
});

/** No write any more: for ever with WRITEDEFINE, until the next TPM Reset or Restart with WRITE_STCLEAR. */
export const NV_WriteLock = command('NV_WriteLock', { code: 0x138, handles: ['!authHandle', 'nvIndex'] });

/** Write-locks all indices with GLOBALLOCK. */
export const NV_GlobalWriteLock = command('NV_GlobalWriteLock', { code: 0x132, handles: ['!authHandle'] });

/** No read until the next TPM Reset or Restart, for indices with READ_STCLEAR. */
export const NV_ReadLock = command('NV_ReadLock', { code: 0x14f, handles: ['!authHandle', 'nvIndex'] });

/** The answer is proved with the new authValue (31.15.1). ADMIN role: needs a policy with PolicyCommandCode. */
export const NV_ChangeAuth = command('NV_ChangeAuth', {
  code: 0x13b,
  handles: ['!nvIndex'],
  params: { newAuth: tpm2b },
  newAuth: ({ newAuth }) => newAuth,
});

/** A signed statement of what the index holds; `certifyInfo` stays as received. */
export const NV_Certify = command('NV_Certify', {
  code: 0x184,
  handles: ['!signHandle', '!authHandle', 'nvIndex'],
  params: { qualifyingData: tpm2b, inScheme: tpmtSigScheme, size: u16, offset: u16 },
  result: { certifyInfo: tpm2b, signature: tpmtSignature },
});
