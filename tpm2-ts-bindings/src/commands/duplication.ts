import { tpm2b } from '../codec.js';
import { command } from '../command.js';
import { tpm2bPublic, tpmtSymDef } from '../structures.js';

/** Part 3, section 13: objects between TPMs. `wrapForImport` and `unwrapDuplicate` do the software's side. */

/** The object needs a policy session with PolicyCommandCode or PolicyDuplicationSelect. */
export const Duplicate = command('Duplicate', {
  code: 0x14b,
  handles: ['!objectHandle', 'newParentHandle'],
  params: { encryptionKeyIn: tpm2b, symmetricAlg: tpmtSymDef },
  result: { encryptionKeyOut: tpm2b, duplicate: tpm2b, outSymSeed: tpm2b },
});

export const Import = command('Import', {
  code: 0x156,
  handles: ['!parentHandle'],
  params: {
    encryptionKey: tpm2b,
    objectPublic: tpm2bPublic,
    duplicate: tpm2b,
    inSymSeed: tpm2b,
    symmetricAlg: tpmtSymDef,
  },
  result: { outPrivate: tpm2b },
});
