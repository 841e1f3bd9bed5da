import assert from 'node:assert/strict';
import fc from 'fast-check';
import * as bindings from 'tpm2-ts-bindings';
import {
  Alg,
  Cap,
  type Codec,
  type Command,
  concat,
  embed,
  type HandleNames,
  hashInfo,
  St,
} from 'tpm2-ts-bindings';
import * as commands from 'tpm2-ts-bindings/internal/commands/index';

/** Values of every codec that the package exports and of every command. What is forgotten here fails by name. */

type Values = fc.Arbitrary<unknown>;
export type AnyCommand = Command<HandleNames, unknown, unknown>;
export const COMMANDS = Object.values(commands) as readonly unknown[] as readonly AnyCommand[];

const edges = (...values: number[]): fc.Arbitrary<number> => fc.constantFrom(...values);
const U8 = fc.oneof(edges(0, 1, 0x7f, 0xff), fc.integer({ min: 0, max: 0xff }));
const U16 = fc.oneof(edges(0, 1, 0x7fff, 0x8000, 0xffff), fc.integer({ min: 0, max: 0xffff }));
const U32 = fc.oneof(
  edges(0, 1, 0x7fffffff, 0x80000000, 0xffffffff),
  fc.integer({ min: 0, max: 0xffffffff }),
);
const I32 = fc.oneof(
  edges(0, -1, 0x7fffffff, -0x80000000),
  fc.integer({ min: -(2 ** 31), max: 2 ** 31 - 1 }),
);
const U64 = fc.oneof(
  fc.constantFrom(
    0n,
    1n,
    2n ** 32n - 1n,
    2n ** 32n,
    2n ** 53n,
    2n ** 53n + 1n,
    2n ** 63n - 1n,
    2n ** 63n,
    2n ** 64n - 1n,
  ),
  fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }),
);
const BYTES = fc.uint8Array({ maxLength: 80 }).map((bytes) => concat(bytes));

/** Records as literals make them, with a prototype: what decode gives. */
function record(model: Record<string, Values>): Values {
  return fc.record(model, { noNullPrototype: true });
}

/** A selector and what it selects. */
function arms(key: string, model: Record<number, Record<string, Values>>): Values {
  return fc.oneof(
    ...Object.entries(model).map(([tag, fields]) => record({ [key]: fc.constant(Number(tag)), ...fields })),
  );
}

function listOf(values: Values): Values {
  return fc.array(values, { maxLength: 5 });
}

function embeddedOf<T>(codec: Codec<T>, values: Values): Values {
  return values.map((value) => embed(codec, value as T));
}

const hashOnly = { hashAlg: U16 };
const symDef = arms('algorithm', { [Alg.NULL]: {}, [Alg.AES]: { keyBits: U16, mode: U16 } });
const sigScheme = arms('scheme', {
  [Alg.NULL]: {},
  [Alg.RSASSA]: hashOnly,
  [Alg.RSAPSS]: hashOnly,
  [Alg.ECDSA]: hashOnly,
  [Alg.HMAC]: hashOnly,
});
const asymScheme = arms('scheme', {
  [Alg.NULL]: {},
  [Alg.RSASSA]: hashOnly,
  [Alg.RSAES]: {},
  [Alg.RSAPSS]: hashOnly,
  [Alg.OAEP]: hashOnly,
  [Alg.ECDSA]: hashOnly,
  [Alg.ECDH]: hashOnly,
});
const kdfScheme = arms('scheme', {
  [Alg.NULL]: {},
  [Alg.KDF1_SP800_56A]: hashOnly,
  [Alg.KDF1_SP800_108]: hashOnly,
});
const keyedHashScheme = arms('scheme', {
  [Alg.NULL]: {},
  [Alg.HMAC]: hashOnly,
  [Alg.XOR]: { hashAlg: U16, kdf: U16 },
});
const parameters = {
  [Alg.ECC]: record({ symmetric: symDef, scheme: asymScheme, curveID: U16, kdf: kdfScheme }),
  [Alg.RSA]: record({ symmetric: symDef, scheme: asymScheme, keyBits: U16, exponent: U32 }),
  [Alg.KEYEDHASH]: record({ scheme: keyedHashScheme }),
  [Alg.SYMCIPHER]: record({ sym: symDef }),
};
const publicParms = arms(
  'type',
  Object.fromEntries(Object.entries(parameters).map(([type, values]) => [type, { parameters: values }])),
);
const point = record({ x: BYTES, y: BYTES });
const publicHead = { nameAlg: U16, objectAttributes: U32, authPolicy: BYTES };
const publicValue = arms('type', {
  [Alg.ECC]: { ...publicHead, parameters: parameters[Alg.ECC], unique: point },
  [Alg.RSA]: { ...publicHead, parameters: parameters[Alg.RSA], unique: BYTES },
  [Alg.KEYEDHASH]: { ...publicHead, parameters: parameters[Alg.KEYEDHASH], unique: BYTES },
  [Alg.SYMCIPHER]: { ...publicHead, parameters: parameters[Alg.SYMCIPHER], unique: BYTES },
});
const pcrSelection = listOf(
  record({
    hash: U16,
    pcrs: fc.uniqueArray(fc.integer({ min: 0, max: 23 })).map((pcrs) => pcrs.sort((a, b) => a - b)),
  }),
);
const taggedDigest = fc.constantFrom(Alg.SHA1, Alg.SHA256, Alg.SHA384, Alg.SHA512).chain((hashAlg) => {
  const size = hashInfo(hashAlg)?.size;
  assert.ok(size);
  const digest = fc.uint8Array({ minLength: size, maxLength: size }).map((bytes) => concat(bytes));
  return record({ hashAlg: fc.constant(hashAlg), digest });
});
const sensitive = record({ sensitiveType: U16, authValue: BYTES, seedValue: BYTES, sensitive: BYTES });
const nvPublic = record({ nvIndex: U32, nameAlg: U16, attributes: U32, authPolicy: BYTES, dataSize: U16 });
const clockInfo = record({ clock: U64, resetCount: U32, restartCount: U32, safe: fc.boolean() });
const contextFields = bindings.struct({
  sequence: bindings.u64,
  savedHandle: bindings.u32,
  hierarchy: bindings.u32,
  contextBlob: bindings.tpm2b,
});

const attestHead = { qualifiedSigner: BYTES, extraData: BYTES, clockInfo, firmwareVersion: U64 };

function attested(model: Record<string, Values>): Record<string, Values> {
  return { ...attestHead, attested: record(model) };
}

/** Of every codec that the package exports. */
const OF_CODEC = new Map<unknown, Values>([
  [bindings.u8, U8],
  [bindings.u16, U16],
  [bindings.u32, U32],
  [bindings.u64, U64],
  [bindings.i32, I32],
  [bindings.yesNo, fc.boolean()],
  [bindings.tpm2b, BYTES],
  [bindings.tpmlPcrSelection, pcrSelection],
  [bindings.tpmlDigest, listOf(BYTES)],
  [bindings.tpmtSymDef, symDef],
  [bindings.tpmtSigScheme, sigScheme],
  [bindings.tpmtAsymScheme, asymScheme],
  [bindings.tpmsEccPoint, point],
  [bindings.tpmtHa, taggedDigest],
  [bindings.tpmtPublicParms, publicParms],
  [bindings.tpmtPublic, publicValue],
  [bindings.tpm2bPublic, embeddedOf(bindings.tpmtPublic, publicValue)],
  [bindings.tpm2bSensitiveCreate, record({ userAuth: BYTES, data: BYTES })],
  [bindings.tpmtSensitive, sensitive],
  [
    bindings.tpmsContext,
    embeddedOf(
      contextFields,
      record({ sequence: U64, savedHandle: U32, hierarchy: U32, contextBlob: BYTES }),
    ),
  ],
  [
    bindings.tpmtSignature,
    arms('sigAlg', {
      [Alg.RSASSA]: { hash: U16, sig: BYTES },
      [Alg.RSAPSS]: { hash: U16, sig: BYTES },
      [Alg.ECDSA]: { hash: U16, signatureR: BYTES, signatureS: BYTES },
    }),
  ],
  [bindings.tpmtTicket, record({ tag: U16, hierarchy: U32, digest: BYTES })],
  [bindings.tpmsNvPublic, nvPublic],
  [bindings.tpm2bNvPublic, embeddedOf(bindings.tpmsNvPublic, nvPublic)],
  [bindings.tpmsClockInfo, clockInfo],
  [bindings.tpmsTimeInfo, record({ time: U64, clockInfo })],
  [
    bindings.tpmsAttest,
    arms('type', {
      [St.ATTEST_QUOTE]: attested({ pcrSelect: pcrSelection, pcrDigest: BYTES }),
      [St.ATTEST_CERTIFY]: attested({ name: BYTES, qualifiedName: BYTES }),
      [St.ATTEST_CREATION]: attested({ objectName: BYTES, creationHash: BYTES }),
      [St.ATTEST_NV]: attested({ indexName: BYTES, offset: U16, nvContents: BYTES }),
      [St.ATTEST_SESSION_AUDIT]: attested({ exclusiveSession: fc.boolean(), sessionDigest: BYTES }),
      [St.ATTEST_COMMAND_AUDIT]: attested({
        auditCounter: U64,
        digestAlg: U16,
        auditDigest: BYTES,
        commandDigest: BYTES,
      }),
      [St.ATTEST_TIME]: attested({ time: record({ time: U64, clockInfo }), firmwareVersion: U64 }),
    }),
  ],
  [
    bindings.tpmsCapabilityData,
    arms('capability', {
      [Cap.ALGS]: { algorithms: listOf(record({ alg: U16, algProperties: U32 })) },
      [Cap.HANDLES]: { handles: listOf(U32) },
      [Cap.COMMANDS]: { commands: listOf(U32) },
      [Cap.PCRS]: { assignedPCR: pcrSelection },
      [Cap.TPM_PROPERTIES]: { properties: listOf(record({ property: U32, value: U32 })) },
      [Cap.ECC_CURVES]: { curves: listOf(U16) },
    }),
  ],
]);

/** Of fields whose codec is made in the declaration of the command. */
const OF_FIELD: Readonly<Record<string, Values>> = {
  'PCR_Extend.digests': listOf(taggedDigest),
  'EventSequenceComplete.results': listOf(taggedDigest),
  'LoadExternal.inPrivate': fc.option(sensitive, { nil: undefined }),
  'SetCommandCodeAuditStatus.setList': listOf(U32),
  'SetCommandCodeAuditStatus.clearList': listOf(U32),
  'ECDH_KeyGen.zPoint': point,
  'ECDH_KeyGen.pubPoint': point,
  'ECDH_ZGen.inPoint': point,
  'ECDH_ZGen.outPoint': point,
};

/** Everything that is exported and reads and writes. */
export const STRUCTURES = Object.entries(bindings as Readonly<Record<string, unknown>>).flatMap(
  ([name, value]): [string, Codec<unknown>][] => (isCodec(value) ? [[name, value]] : []),
);

function isCodec(value: unknown): value is Codec<unknown> {
  return typeof value === 'object' && value !== null && 'read' in value && 'write' in value;
}

export function valuesOf(name: string, codec: Codec<unknown>): Values {
  const values = OF_CODEC.get(codec) ?? OF_FIELD[name];
  assert.ok(values, `${name} has no values in arbitrary.ts; add some`);
  return values;
}

/** The parameters or the result of a command, field by field. */
export function fieldsOf(command: AnyCommand, which: 'params' | 'result'): Values {
  const { fields } = command[which] as unknown as { fields: Readonly<Record<string, Codec<unknown>>> };
  return record(
    Object.fromEntries(
      Object.entries(fields).map(([name, codec]) => [name, valuesOf(`${command.name}.${name}`, codec)]),
    ),
  );
}

/** A change of a few bytes: one bit, one byte, cut, longer, a piece taken out or doubled. */
export const MUTATION: fc.Arbitrary<(bytes: Buffer) => Buffer> = fc
  .array(
    fc.record({
      kind: fc.constantFrom('bit', 'byte', 'word', 'cut', 'append', 'remove', 'double'),
      at: fc.nat(),
      value: U32,
    }),
    { minLength: 1, maxLength: 3 },
  )
  .map((changes) => (bytes) => changes.reduce<Buffer>(mutate, bytes));

function mutate(bytes: Buffer, { kind, at, value }: { kind: string; at: number; value: number }): Buffer {
  const out = Buffer.from(bytes);
  const position = bytes.length === 0 ? 0 : at % bytes.length;
  const few = value % 8;
  switch (kind) {
    case 'bit':
      if (out.length > 0) out[position] = (out[position] ?? 0) ^ (1 << few);
      return out;
    case 'byte':
      if (out.length > 0) out[position] = value & 0xff;
      return out;
    case 'word':
      if (out.length >= 4) out.writeUInt32BE(value, Math.min(position, out.length - 4));
      return out;
    case 'cut':
      return out.subarray(0, position);
    case 'append':
      return Buffer.concat([out, Buffer.alloc(few, value & 0xff)]);
    case 'remove':
      return Buffer.concat([out.subarray(0, position), out.subarray(position + few)]);
    default:
      return Buffer.concat([out.subarray(0, position + few), out.subarray(position)]);
  }
}
