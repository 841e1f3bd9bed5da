import {
  type Codec,
  decode,
  encode,
  type ObjectEntity,
  type PcrSelection,
  type PublicArea,
  type SavedContext,
  struct,
  TpmError,
  tagged,
  tpm2b,
  tpm2bPublic,
  tpmsContext,
  tpmtSignature,
  u16,
  u32,
  u64,
} from 'tpm2-ts-bindings';

/**
 * The files of tpm2-tools 5: what one of them writes and another reads. Most are a structure of Part 2 as it goes over
 * the wire; some have a head of their own, and the file of PCR values is memory of a program on a little-endian machine.
 */

/** `-u` of create, load, import and readpublic. */
export const publicFile = tpm2bPublic;
/** `-r` of create, load, duplicate and import. */
export const privateFile = tpm2b;
/** `-s` of duplicate and import: what the new parent decrypts the outer wrapper with. */
export const seedFile = tpm2b;
/** `-s` of quote, sign and policysigned in their own format, not `plain`. */
export const signatureFile = tpmtSignature;

const MAGIC = 0xbadcc0de;
const VERSION = 1;

/** A file with the head that credentials and contexts have. */
function headed<T>(what: string, content: Codec<T>): Codec<T> {
  return {
    write(writer, value) {
      u32.write(writer, MAGIC);
      u32.write(writer, VERSION);
      content.write(writer, value);
    },
    read(reader) {
      const [magic, version] = [u32.read(reader), u32.read(reader)];
      if (magic !== MAGIC || version !== VERSION)
        throw new TpmError('malformed', `no ${what} of tpm2-tools in version ${VERSION}`);
      return content.read(reader);
    },
  };
}

/** `-o` of makecredential, `-i` of activatecredential. */
export const credentialFile = headed('credential', struct({ credentialBlob: tpm2b, secret: tpm2b }));

const wireContext = struct({ sequence: u64, savedHandle: u32, hierarchy: u32, contextBlob: tpm2b });

/** What the ESAPI keeps beside a context, of one object. `size` is written as 0 by all versions. */
const esysMetadata = struct({
  size: u16,
  handle: u32,
  name: tpm2b,
  resource: tagged('type', u32, { 1: struct({ publicArea: tpm2bPublic }) }),
});
const esysContext = struct({ reserved: u32, tpmContext: tpm2b, metadata: esysMetadata });
const fileContext = headed(
  'context',
  struct({ hierarchy: u32, savedHandle: u32, sequence: u64, contextBlob: tpm2b }),
);

/** A file for `-c` and `-C` from what ContextSave gave for `object`. */
export function writeContextFile(context: SavedContext, object: ObjectEntity): Buffer {
  const { hierarchy, savedHandle, sequence, contextBlob } = context.value;
  return encode(fileContext, {
    hierarchy,
    savedHandle,
    sequence,
    contextBlob: encode(esysContext, {
      reserved: 0,
      tpmContext: contextBlob,
      metadata: {
        size: 0,
        handle: savedHandle,
        name: object.name,
        resource: { type: 1, publicArea: object.publicArea },
      },
    }),
  });
}

/** What ContextLoad takes, and the public area that the tools keep with it. @throws TpmError `malformed` */
export function readContextFile(bytes: Buffer): { context: SavedContext; publicArea: PublicArea } {
  const { contextBlob, ...head } = decode(fileContext, bytes, 'context file');
  const { tpmContext, metadata } = decode(esysContext, contextBlob, 'context file');
  return {
    context: decode(tpmsContext, encode(wireContext, { ...head, contextBlob: tpmContext })),
    publicArea: metadata.resource.publicArea,
  };
}

/** TPML_PCR_SELECTION and TPML_DIGEST as a C compiler lays them out. */
const MAX_BANKS = 16;
const BANK_SIZE = 8;
const SELECTION_SIZE = 4 + MAX_BANKS * BANK_SIZE;
const MAX_DIGESTS = 8;
const DIGEST_SIZE = 2 + 64;
const DIGEST_LIST_SIZE = 4 + MAX_DIGESTS * DIGEST_SIZE;

/** `-o` of quote and pcrread with `serialized`, `-f` of checkquote. @param values in the order of selection */
export function writePcrFile(selection: PcrSelection, values: readonly Buffer[]): Buffer {
  const lists = Math.ceil(values.length / MAX_DIGESTS);
  const out = Buffer.alloc(SELECTION_SIZE + 4 + lists * DIGEST_LIST_SIZE);
  out.writeUInt32LE(selection.length);
  selection.forEach(({ hash, pcrs }, bank) => {
    const at = 4 + bank * BANK_SIZE;
    out.writeUInt16LE(hash, at);
    out.writeUInt8(3, at + 2);
    for (const pcr of pcrs) {
      const byte = at + 3 + (pcr >>> 3);
      out.writeUInt8(out.readUInt8(byte) | (1 << (pcr & 7)), byte);
    }
  });
  out.writeUInt32LE(lists, SELECTION_SIZE);
  values.forEach((value, index) => {
    const list = listAt(Math.floor(index / MAX_DIGESTS));
    out.writeUInt32LE((index % MAX_DIGESTS) + 1, list);
    const at = list + 4 + (index % MAX_DIGESTS) * DIGEST_SIZE;
    out.writeUInt16LE(value.length, at);
    out.set(value, at + 2);
  });
  return out;
}

export function readPcrFile(bytes: Buffer): { selection: PcrSelection; values: Buffer[] } {
  const selection = Array.from({ length: bytes.readUInt32LE() }, (_, bank) => {
    const at = 4 + bank * BANK_SIZE;
    const map = bytes.readUIntLE(at + 3, 3);
    return {
      hash: bytes.readUInt16LE(at),
      pcrs: Array.from({ length: 24 }, (_, pcr) => pcr).filter((pcr) => (map & (1 << pcr)) !== 0),
    };
  });
  const values = Array.from({ length: bytes.readUInt32LE(SELECTION_SIZE) }, (_, index) => {
    const list = listAt(index);
    return Array.from({ length: bytes.readUInt32LE(list) }, (_, digest) => {
      const at = list + 4 + digest * DIGEST_SIZE;
      return bytes.subarray(at + 2, at + 2 + bytes.readUInt16LE(at));
    });
  });
  return { selection, values: values.flat() };
}

function listAt(index: number): number {
  return SELECTION_SIZE + 4 + index * DIGEST_LIST_SIZE;
}
