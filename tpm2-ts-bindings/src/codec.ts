import { TpmError } from './error.js';
import { type Embedded, Reader, Writer } from './wire.js';

/**
 * Declarations of wire formats. One declaration is both the format and the TypeScript type: `ValueOf<typeof x>`.
 * A value that does not fit is refused before anything is sent; bytes that are missing, left over or out of range are
 * refused on the way in.
 */
export interface Codec<T> {
  write(writer: Writer, value: T): void;
  read(reader: Reader): T;
  /**
   * It starts with its own two-byte size. Only such a first parameter can be encrypted (Part 1, "Session-Based
   * Encryption").
   */
  readonly sized?: boolean;
}

export type ValueOf<C> = C extends Codec<infer T> ? T : never;
export type Fields = Readonly<Record<string, Codec<unknown>>>;
export type StructValue<F extends Fields> = { readonly [K in keyof F]: ValueOf<F[K]> };

/** Refuses more list elements than any TPM structure has, whatever the count field says. */
const MAX_LIST = 1024;

const unsigned = (size: 1 | 2 | 4): Codec<number> => ({
  write: (writer, value) => writer.unsigned(value, size),
  read: (reader) => reader.unsigned(size),
});

export const u8 = unsigned(1);
export const u16 = unsigned(2);
export const u32 = unsigned(4);

/** bigint: a number loses bits above 2^53. */
export const u64: Codec<bigint> = {
  write: (writer, value) => writer.u64(value),
  read: (reader) => reader.u64(),
};

export const i32: Codec<number> = {
  write(writer, value) {
    if (!Number.isInteger(value) || value < -(2 ** 31) || value >= 2 ** 31)
      throw new TpmError('usage', `${value} does not fit in 32 signed bits`);
    writer.unsigned(value >>> 0, 4);
  },
  read: (reader) => reader.unsigned(4) | 0,
};

/** TPMI_YES_NO. */
export const yesNo: Codec<boolean> = {
  write: (writer, value) => writer.unsigned(value ? 1 : 0, 1),
  read(reader) {
    const value = reader.unsigned(1);
    if (value > 1) throw new TpmError('malformed', `${reader.what}: ${value} is neither yes nor no`);
    return value === 1;
  },
};

/** TPM2B: two bytes of size, then as many bytes. */
export const tpm2b: Codec<Buffer> = {
  sized: true,
  write: (writer, value) => writer.sized(() => writer.bytes(value)),
  read: (reader) => reader.bytes(reader.unsigned(2)),
};

/** A TPM2B whose content is a structure that nothing else depends on byte by byte. */
export function sized<T>(codec: Codec<T>): Codec<T> {
  return {
    sized: true,
    write: (writer, value) => writer.sized(() => codec.write(writer, value)),
    read(reader) {
      const inner = reader.within(reader.unsigned(2));
      const value = codec.read(inner);
      inner.end();
      return value;
    },
  };
}

/** A TPM2B whose content is a structure that is named, signed or replayed: the bytes stay with it. */
export function embedded<T>(codec: Codec<T>): Codec<Embedded<T>> {
  return {
    sized: true,
    write: (writer, value) => tpm2b.write(writer, value.bytes),
    read(reader) {
      const bytes = tpm2b.read(reader);
      return { bytes, value: decode(codec, bytes, reader.what) };
    },
  };
}

/** A structure without a size of its own that is replayed as it came. */
export function captured<T>(codec: Codec<T>): Codec<Embedded<T>> {
  return {
    write: (writer, value) => writer.bytes(value.bytes),
    read: (reader) => reader.capture(() => codec.read(reader)),
  };
}

/** A TPM2B that may be empty: undefined stands for that. */
export function optional<T>(codec: Codec<T>): Codec<T | undefined> {
  const full = sized(codec);
  return {
    sized: true,
    write(writer, value) {
      if (value === undefined) tpm2b.write(writer, Buffer.alloc(0));
      else full.write(writer, value);
    },
    read(reader) {
      const inner = reader.within(reader.unsigned(2));
      if (inner.left === 0) return undefined;
      const value = codec.read(inner);
      inner.end();
      return value;
    },
  };
}

/** Four bytes of count, then the elements (TPML). */
export function list<T>(codec: Codec<T>): Codec<readonly T[]> {
  return {
    write(writer, values) {
      writer.unsigned(values.length, 4);
      for (const value of values) codec.write(writer, value);
    },
    read(reader) {
      const count = reader.unsigned(4);
      // No element is empty on the wire, so a count beyond the bytes left is a lie.
      if (count > MAX_LIST || count > reader.left) {
        throw new TpmError(
          'malformed',
          `${reader.what}: a list of ${count} elements in ${reader.left} bytes`,
        );
      }
      return Array.from({ length: count }, () => codec.read(reader));
    },
  };
}

/** Fields one after the other, in the order of declaration. */
export function struct<F extends Fields>(fields: F): Codec<StructValue<F>> & { readonly fields: F } {
  const entries = Object.entries(fields);
  return {
    fields,
    write(writer, value) {
      for (const [name, codec] of entries) codec.write(writer, (value as Record<string, unknown>)[name]);
    },
    read(reader) {
      const out: Record<string, unknown> = {};
      for (const [name, codec] of entries) out[name] = codec.read(reader);
      return out as StructValue<F>;
    },
  };
}

/** What a selector can select: a format for each of its values. */
export type Arms = Readonly<Record<number, Codec<object>>>;
/** A value of one of the arms, with its selector. */
export type TaggedValue<K extends string, A extends Arms> = {
  [T in keyof A]: { readonly [P in K]: T } & ValueOf<A[T]>;
}[keyof A];

/** A selector and what it selects, as a discriminated union: a wrong arm does not compile. */
export function tagged<const K extends string, A extends Arms>(
  key: K,
  selector: Codec<number>,
  arms: A,
): Codec<TaggedValue<K, A>> {
  return {
    write(writer, value) {
      const tag = (value as Record<string, number>)[key] ?? -1;
      const arm = arms[tag];
      if (arm === undefined) throw new TpmError('usage', `${key} ${tag} is not supported`);
      selector.write(writer, tag);
      arm.write(writer, value as object);
    },
    read(reader) {
      const tag = selector.read(reader);
      const arm = arms[tag];
      if (arm === undefined) {
        throw new TpmError('malformed', `${reader.what}: ${key} 0x${tag.toString(16)} is not supported`);
      }
      return { [key]: tag, ...arm.read(reader) } as TaggedValue<K, A>;
    },
  };
}

/** The wire form of a value. @throws TpmError `usage` where it does not fit */
export function encode<T>(codec: Codec<T>, value: T): Buffer {
  const writer = new Writer();
  try {
    codec.write(writer, value);
    return writer.finish();
  } finally {
    writer.wipe();
  }
}

/** The value of a wire form, all of it. @throws TpmError `malformed` */
export function decode<T>(codec: Codec<T>, bytes: Uint8Array, what = 'structure'): T {
  const reader = new Reader(bytes, what);
  const value = codec.read(reader);
  reader.end();
  return value;
}

/** A value with the bytes that stand for it. */
export function embed<T>(codec: Codec<T>, value: T): Embedded<T> {
  return { bytes: encode(codec, value), value };
}
