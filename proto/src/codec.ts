import Long from 'long';
import protobuf from 'protobufjs/light.js';
import { ProtoError } from './error.js';
import { descriptor, type Messages } from './generated/messages.js';

/**
 * Encodes and decodes the messages of package `vtpm.v1`. 64-bit integers are `bigint`, enums are their names.
 * One codec serves the manager, the workers and the toolstack, so that none reads a message differently.
 */
export function encode<K extends keyof Messages>(name: K, value: Messages[K]): Buffer {
  const type = lookup(name);
  const bytes = type.encode(toWire(type, value as unknown as Plain)).finish();
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

/** Bytes fields of the result are views into `bytes`. @throws ProtoError `malformed` for anything but one whole, known message */
export function decode<K extends keyof Messages>(name: K, bytes: Uint8Array): Messages[K] {
  const type = lookup(name);
  try {
    return fromWire(type, type.decode(bytes) as unknown as Plain) as unknown as Messages[K];
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

// protobufjs looks for `long` with an eval'd require that a bundle does not satisfy.
protobuf.util.Long = Long;
protobuf.configure();

const root = protobuf.Root.fromJSON(descriptor as protobuf.INamespace);
root.resolveAll();
const types = new Map<string, protobuf.Type>();

function lookup(name: string): protobuf.Type {
  let type = types.get(name);
  if (!type) {
    type = root.lookupType(`vtpm.v1.${name}`);
    types.set(name, type);
  }
  return type;
}

function isOptional(field: protobuf.Field): boolean {
  return field.resolvedType instanceof protobuf.Type || field.options?.proto3_optional === true;
}

function toWire(type: protobuf.Type, value: Plain): Plain {
  const out: Plain = {};
  for (const field of type.fieldsArray) {
    const given = value[field.name];
    if (given === undefined) {
      if (!isOptional(field)) throw new ProtoError('malformed', `${type.name}.${field.name} is missing`);
      continue;
    }
    out[field.name] = field.repeated
      ? (given as unknown[]).map((item) => scalarToWire(field, item))
      : scalarToWire(field, given);
  }
  return out;
}

function scalarToWire(field: protobuf.Field, value: unknown): unknown {
  const resolved = field.resolvedType;
  if (resolved instanceof protobuf.Type) return toWire(resolved, value as Plain);
  if (resolved instanceof protobuf.Enum) return resolved.values[value as string];
  if (field.type === 'uint64') {
    const wide = value as bigint;
    if (wide < 0n || wide > 0xffffffffffffffffn)
      throw new ProtoError('malformed', `${field.name} is not a 64-bit unsigned value`);
    return new Long(Number(wide & 0xffffffffn) | 0, Number(wide >> 32n) | 0, true);
  }
  return value;
}

function fromWire(type: protobuf.Type, message: Plain): Plain {
  const out: Plain = {};
  for (const field of type.fieldsArray) {
    const present = Object.hasOwn(message, field.name);
    if (field.repeated) {
      out[field.name] = present
        ? (message[field.name] as unknown[]).map((item) => scalarFromWire(field, item))
        : [];
    } else if (present) {
      out[field.name] = scalarFromWire(field, message[field.name]);
    } else if (!isOptional(field)) {
      out[field.name] = defaultOf(field);
    }
  }
  return out;
}

function scalarFromWire(field: protobuf.Field, value: unknown): unknown {
  const resolved = field.resolvedType;
  if (resolved instanceof protobuf.Type) return fromWire(resolved, value as Plain);
  if (resolved instanceof protobuf.Enum) {
    const name = resolved.valuesById[value as number];
    if (!value || name === undefined)
      throw new ProtoError('malformed', `${field.name}: unknown value ${String(value)}`);
    return name;
  }
  if (field.type === 'uint64') {
    const { low, high } = value as Long;
    return (BigInt(high >>> 0) << 32n) | BigInt(low >>> 0);
  }
  return value;
}

const EMPTY = new Uint8Array(0);

function defaultOf(field: protobuf.Field): unknown {
  if (field.resolvedType instanceof protobuf.Enum) {
    throw new ProtoError('malformed', `${field.name} is missing`);
  }
  if (field.type === 'bytes') return EMPTY;
  if (field.type === 'string') return '';
  if (field.type === 'bool') return false;
  return field.type === 'uint64' ? 0n : 0;
}
