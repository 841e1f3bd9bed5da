import protobuf from 'protobufjs/minimal.js';
import { ProtoError } from './error.js';
import { descriptor, type Messages } from './generated/messages.js';

/**
 * Encodes and decodes the messages of package `vtpm.v1`. 64-bit integers are `bigint`, enums are their names.
 * One codec serves the manager, the workers and the toolstack, so that none reads a message differently.
 *
 * It runs on protobufjs's Reader and Writer and not on its reflection, which compiles code for each message: that costs
 * each worker 2 MiB and 15 ms, and each Save a second copy of every field.
 */
export function encode<K extends keyof Messages>(name: K, value: Messages[K]): Buffer {
  const bytes = write(protobuf.Writer.create(), lookup(name), value as unknown as Plain).finish();
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

/** Bytes fields of the result are views into `bytes`. @throws ProtoError `malformed` for anything but one whole, known message */
export function decode<K extends keyof Messages>(name: K, bytes: Uint8Array): Messages[K] {
  const message = lookup(name);
  try {
    return read(protobuf.Reader.create(bytes), message, bytes.length) as unknown as Messages[K];
  } catch (cause) {
    if (cause instanceof ProtoError) throw cause;
    throw new ProtoError(
      'malformed',
      `${name}: ${cause instanceof Error ? cause.message : 'not readable'}`,
      cause,
    );
  }
}

type Plain = Record<string, unknown>;

interface Field {
  readonly name: string;
  readonly id: number;
  readonly kind: 'bytes' | 'string' | 'bool' | 'uint32' | 'uint64' | 'enum' | 'message';
  readonly isRepeated: boolean;
  readonly isOptional: boolean;
  /** Of an enum, without the unspecified one. */
  readonly numbers: ReadonlyMap<string, number>;
  readonly names: ReadonlyMap<number, string>;
  /** Name of the type of a message. */
  readonly type: string;
}

interface Message {
  readonly name: string;
  /** In the order of their numbers, which is the order on the wire. */
  readonly fields: readonly Field[];
  readonly byId: ReadonlyMap<number, Field>;
}

/** What scripts/generate-proto.mjs takes over from protobufjs's JSON descriptor. */
interface Described {
  readonly values?: Readonly<Record<string, number>>;
  readonly fields?: Readonly<Record<string, DescribedField>>;
}

interface DescribedField {
  readonly type: string;
  readonly id: number;
  readonly rule?: string;
  readonly options?: { readonly proto3_optional?: boolean };
}

/** Wire types (Protocol Buffers encoding, "Message Structure"). */
const VARINT = 0;
const LENGTH_DELIMITED = 2;

const EMPTY = new Uint8Array(0);
const types = (descriptor as { nested: { vtpm: { nested: { v1: { nested: Record<string, Described> } } } } })
  .nested.vtpm.nested.v1.nested;
const messages = new Map<string, Message>();

function lookup(name: string): Message {
  let message = messages.get(name);
  if (!message) {
    const fields = Object.entries(types[name]?.fields ?? {}).map(([key, field]) => plan(key, field));
    fields.sort((a, b) => a.id - b.id);
    message = { name, fields, byId: new Map(fields.map((field) => [field.id, field])) };
    messages.set(name, message);
  }
  return message;
}

function plan(name: string, { type, id, rule, options }: DescribedField): Field {
  const values = Object.entries(types[type]?.values ?? {}).filter(([, number]) => number !== 0);
  const kind = types[type]?.values ? 'enum' : types[type]?.fields ? 'message' : (type as Field['kind']);
  return {
    name,
    id,
    kind,
    isRepeated: rule === 'repeated',
    isOptional: kind === 'message' || options?.proto3_optional === true,
    numbers: new Map(values),
    names: new Map(values.map(([key, number]) => [number, key])),
    type,
  };
}

function write(writer: protobuf.Writer, message: Message, value: Plain): protobuf.Writer {
  for (const field of message.fields) {
    const given = value[field.name];
    if (given === undefined) {
      if (field.isRepeated || !field.isOptional) {
        throw new ProtoError('malformed', `${message.name}.${field.name} is missing`);
      }
    } else if (!field.isRepeated) {
      writeOne(writer.uint32(tagOf(field)), field, given);
    } else if (wireTypeOf(field) === VARINT) {
      // Repeated numbers are packed.
      const items = given as unknown[];
      if (items.length === 0) continue;
      writer.uint32((field.id << 3) | LENGTH_DELIMITED).fork();
      for (const item of items) writeOne(writer, field, item);
      writer.ldelim();
    } else {
      for (const item of given as unknown[]) writeOne(writer.uint32(tagOf(field)), field, item);
    }
  }
  return writer;
}

function writeOne(writer: protobuf.Writer, field: Field, value: unknown): void {
  switch (field.kind) {
    case 'bytes':
      writer.bytes(value as Uint8Array);
      return;
    case 'string':
      writer.string(value as string);
      return;
    case 'bool':
      writer.bool(value as boolean);
      return;
    case 'uint32':
      writer.uint32(value as number);
      return;
    case 'uint64':
      writer.uint64(toWide(field, value as bigint));
      return;
    case 'enum': {
      const number = field.numbers.get(value as string);
      if (number === undefined) throw new ProtoError('malformed', `${field.name}: unknown value`);
      writer.int32(number);
      return;
    }
    case 'message':
      write(writer.fork(), lookup(field.type), value as Plain).ldelim();
  }
}

function read(reader: protobuf.Reader, message: Message, end: number): Plain {
  const out: Plain = {};
  while (reader.pos < end) {
    const tag = reader.uint32();
    const field = message.byId.get(tag >>> 3);
    if (!field) {
      reader.skipType(tag & 7);
      continue;
    }
    const isPacked = field.isRepeated && wireTypeOf(field) === VARINT && (tag & 7) === LENGTH_DELIMITED;
    if (!isPacked && (tag & 7) !== wireTypeOf(field)) {
      throw new ProtoError('malformed', `${message.name}.${field.name} has another wire type`);
    }
    if (!field.isRepeated) {
      out[field.name] = readOne(reader, field);
      continue;
    }
    out[field.name] ??= [];
    const items = out[field.name] as unknown[];
    if (!isPacked) {
      items.push(readOne(reader, field));
    } else {
      const endOfItems = endOfNext(reader);
      while (reader.pos < endOfItems) items.push(readOne(reader, field));
      expectAt(reader, endOfItems);
    }
  }
  expectAt(reader, end);
  for (const field of message.fields) {
    if (out[field.name] === undefined) setDefault(out, field);
  }
  return out;
}

function readOne(reader: protobuf.Reader, field: Field): unknown {
  switch (field.kind) {
    case 'bytes':
      return reader.bytes();
    case 'string':
      return reader.string();
    case 'bool':
      return reader.bool();
    case 'uint32':
      return reader.uint32();
    case 'uint64':
      return fromWide(reader.uint64());
    case 'enum': {
      const number = reader.int32();
      const name = field.names.get(number);
      if (name === undefined) throw new ProtoError('malformed', `${field.name}: unknown value ${number}`);
      return name;
    }
    case 'message':
      return read(reader, lookup(field.type), endOfNext(reader));
  }
}

function setDefault(out: Plain, field: Field): void {
  if (field.isRepeated) out[field.name] = [];
  else if (!field.isOptional) out[field.name] = defaultOf(field);
}

function defaultOf(field: Field): unknown {
  switch (field.kind) {
    case 'bytes':
      return EMPTY;
    case 'string':
      return '';
    case 'bool':
      return false;
    case 'uint32':
      return 0;
    case 'uint64':
      return 0n;
    default:
      throw new ProtoError('malformed', `${field.name} is missing`);
  }
}

/** Reads the length of what follows. @returns where that ends */
function endOfNext(reader: protobuf.Reader): number {
  const end = reader.uint32() + reader.pos;
  if (end > reader.len) throw new ProtoError('malformed', 'a field is longer than its message');
  return end;
}

function expectAt(reader: protobuf.Reader, end: number): void {
  if (reader.pos !== end) throw new ProtoError('malformed', 'a field crosses the end of its message');
}

function wireTypeOf(field: Field): number {
  return field.kind === 'bytes' || field.kind === 'string' || field.kind === 'message'
    ? LENGTH_DELIMITED
    : VARINT;
}

function tagOf(field: Field): number {
  return (field.id << 3) | wireTypeOf(field);
}

function toWide(field: Field, value: bigint): number | protobuf.Long {
  if (value < 0n || value > 0xffffffffffffffffn) {
    throw new ProtoError('malformed', `${field.name} is not a 64-bit unsigned value`);
  }
  if (value <= Number.MAX_SAFE_INTEGER) return Number(value);
  return { low: Number(value & 0xffffffffn) | 0, high: Number(value >> 32n) | 0, unsigned: true };
}

function fromWide(value: number | protobuf.Long): bigint {
  // Without the package `long` the reader gives numbers, of which large ones are not exact.
  if (typeof value === 'number') throw new ProtoError('malformed', '64-bit integers cannot be read here');
  const low = BigInt(value.low >>> 0);
  return value.high === 0 ? low : (BigInt(value.high >>> 0) << 32n) | low;
}
