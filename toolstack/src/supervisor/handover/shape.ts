/** Checks a value that came from another program, and says where it is not what it must be. @throws ShapeError */
export type Shape<T> = (value: unknown, place: string) => T;

/** What a shape describes. */
export type Shaped<S> = S extends Shape<infer T> ? T : never;

export class ShapeError extends Error {
  override readonly name = 'ShapeError';
}

export function count(most: number = Number.MAX_SAFE_INTEGER, least = 0): Shape<number> {
  return (value, place) => {
    if (Number.isSafeInteger(value) && Number(value) >= least && Number(value) <= most) return Number(value);
    throw new ShapeError(`${place} is not a whole number from ${least} to ${most}`);
  };
}

export function text(pattern: RegExp, longest: number): Shape<string> {
  return (value, place) => {
    if (typeof value === 'string' && value.length <= longest && pattern.test(value)) return value;
    throw new ShapeError(`${place} is not text of the right form`);
  };
}

export function oneOf<const T extends string>(...values: readonly T[]): Shape<T> {
  return (value, place) => {
    const found = values.find((candidate) => candidate === value);
    if (found !== undefined) return found;
    throw new ShapeError(`${place} is none of ${values.join(', ')}`);
  };
}

export const flag: Shape<boolean> = (value, place) => {
  if (typeof value === 'boolean') return value;
  throw new ShapeError(`${place} is neither true nor false`);
};

export function orNull<T>(shape: Shape<T>): Shape<T | null> {
  return (value, place) => (value === null ? null : shape(value, place));
}

export function list<T>(shape: Shape<T>, most: number): Shape<T[]> {
  return (value, place) => {
    if (!Array.isArray(value) || value.length > most) {
      throw new ShapeError(`${place} is not a list of at most ${most}`);
    }
    return value.map((item, index) => shape(item, `${place}[${index}]`));
  };
}

/** Some of these fields, each of the same shape. */
export function partial<const N extends string, T>(
  names: readonly N[],
  shape: Shape<T>,
): Shape<Partial<Record<N, T>>> {
  return (value, place) => {
    const given = typeof value === 'object' && value !== null ? Object.keys(value) : [];
    const found = names.filter((name) => given.includes(name));
    const fields = object(Object.fromEntries(found.map((name) => [name, shape])))(value, place);
    return fields as Partial<Record<N, T>>;
  };
}

const ADDED = new WeakSet<Shape<unknown>>();

/** A field that older programs do not write: null where it is absent. */
export function added<T>(shape: Shape<T>): Shape<T | null> {
  const orNone = orNull(shape);
  ADDED.add(orNone);
  return orNone;
}

/** Exactly these fields: one that is not known may be the one that matters. */
export function object<S extends Readonly<Record<string, Shape<unknown>>>>(
  fields: S,
): Shape<{ -readonly [K in keyof S]: Shaped<S[K]> }> {
  return (value, place) => {
    if (typeof value !== 'object' || value === null || Array.isArray(value)) {
      throw new ShapeError(`${place} is not an object`);
    }
    const given = new Map(Object.entries(value));
    const out: Record<string, unknown> = {};
    for (const [name, shape] of Object.entries(fields)) {
      if (!given.has(name) && ADDED.has(shape)) given.set(name, null);
      if (!given.has(name)) throw new ShapeError(`${place}.${name} is missing`);
      out[name] = shape(given.get(name), `${place}.${name}`);
      given.delete(name);
    }
    for (const name of given.keys()) throw new ShapeError(`${place}.${name.slice(0, 40)} is not known`);
    return out as { -readonly [K in keyof S]: Shaped<S[K]> };
  };
}
