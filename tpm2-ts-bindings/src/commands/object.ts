import { tpm2b, u32 } from '../codec.js';
import { command } from '../command.js';
import { tpm2bPublic, tpm2bSensitiveCreate, tpmlPcrSelection, tpmtTicket } from '../structures.js';

/** Part 3, sections 12 and 24.1: objects. `creationData` stays as received: its hash is certified. */

const creation = {
  inSensitive: tpm2bSensitiveCreate,
  inPublic: tpm2bPublic,
  outsideInfo: tpm2b,
  creationPCR: tpmlPcrSelection,
};

export const Create = command('Create', {
  code: 0x153,
  handles: ['!parentHandle'],
  params: creation,
  result: {
    outPrivate: tpm2b,
    outPublic: tpm2bPublic,
    creationData: tpm2b,
    creationHash: tpm2b,
    creationTicket: tpmtTicket,
  },
});

export const Load = command('Load', {
  code: 0x157,
  handles: ['!parentHandle'],
  params: { inPrivate: tpm2b, inPublic: tpm2bPublic },
  resultHandles: ['objectHandle'],
  result: { name: tpm2b },
});

export const ReadPublic = command('ReadPublic', {
  code: 0x173,
  handles: ['objectHandle'],
  result: { outPublic: tpm2bPublic, name: tpm2b, qualifiedName: tpm2b },
});

export const Unseal = command('Unseal', {
  code: 0x15e,
  handles: ['!itemHandle'],
  result: { outData: tpm2b },
});

export const CreatePrimary = command('CreatePrimary', {
  code: 0x131,
  handles: ['!primaryHandle'],
  params: creation,
  resultHandles: ['objectHandle'],
  result: {
    outPublic: tpm2bPublic,
    creationData: tpm2b,
    creationHash: tpm2b,
    creationTicket: tpmtTicket,
    name: tpm2b,
  },
});

/** Part 3, section 28: what is loaded and what stays. */

/** Removes an object or session from the TPM's memory. The handle is a parameter: it cannot be authorised. */
export const FlushContext = command('FlushContext', { code: 0x165, params: { flushHandle: u32 } });

/** Makes an object persistent, or with a persistent `objectHandle` removes it. */
export const EvictControl = command('EvictControl', {
  code: 0x120,
  handles: ['!auth', 'objectHandle'],
  params: { persistentHandle: u32 },
});
