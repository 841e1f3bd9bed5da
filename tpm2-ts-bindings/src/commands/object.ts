import { optional, tpm2b, u32 } from '../codec.js';
import { command } from '../command.js';
import {
  tpm2bPublic,
  tpm2bSensitiveCreate,
  tpmlPcrSelection,
  tpmtSensitive,
  tpmtTicket,
} from '../structures.js';

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

/** Without `inPrivate`: only the public part, in any hierarchy. With it: everything, in the null hierarchy only. */
export const LoadExternal = command('LoadExternal', {
  code: 0x167,
  params: { inPrivate: optional(tpmtSensitive), inPublic: tpm2bPublic, hierarchy: u32 },
  resultHandles: ['objectHandle'],
  result: { name: tpm2b },
});

export const ReadPublic = command('ReadPublic', {
  code: 0x173,
  handles: ['objectHandle'],
  result: { outPublic: tpm2bPublic, name: tpm2b, qualifiedName: tpm2b },
});

/** `credentialBlob` and `secret` are for ActivateCredential; `makeCredential` gives the same without a TPM. */
export const MakeCredential = command('MakeCredential', {
  code: 0x168,
  handles: ['handle'],
  params: { credential: tpm2b, objectName: tpm2b },
  result: { credentialBlob: tpm2b, secret: tpm2b },
});

export const ActivateCredential = command('ActivateCredential', {
  code: 0x147,
  handles: ['!activateHandle', '!keyHandle'],
  params: { credentialBlob: tpm2b, secret: tpm2b },
  result: { certInfo: tpm2b },
});

export const Unseal = command('Unseal', {
  code: 0x15e,
  handles: ['!itemHandle'],
  result: { outData: tpm2b },
});

/** The loaded object keeps its authValue; the new one is in `outPrivate` alone. */
export const ObjectChangeAuth = command('ObjectChangeAuth', {
  code: 0x150,
  handles: ['!objectHandle', 'parentHandle'],
  params: { newAuth: tpm2b },
  result: { outPrivate: tpm2b },
});

/** A child or, with a hierarchy as parent, a primary object, loaded at once. No creation data comes. */
export const CreateLoaded = command('CreateLoaded', {
  code: 0x191,
  handles: ['!parentHandle'],
  params: { inSensitive: tpm2bSensitiveCreate, inPublic: tpm2bPublic },
  resultHandles: ['objectHandle'],
  result: { outPrivate: tpm2b, outPublic: tpm2bPublic, name: tpm2b },
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
