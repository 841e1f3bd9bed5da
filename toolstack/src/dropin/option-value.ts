import { DropinRefusal } from './refusal.js';

/**
 * How a part of a value is written: `flag` stands alone, `switch` may (`truncate` or `truncate=true`), the others have a
 * value. `mode` is octal.
 */
export type PartKind = 'flag' | 'switch' | 'text' | 'number' | 'mode';

type PartValue<K extends PartKind> = K extends 'flag' | 'switch' ? true : K extends 'text' ? string : number;

export type OptionValue<S extends Readonly<Record<string, PartKind>>> = {
  readonly [N in keyof S]?: PartValue<S[N]>;
};

/** Numbers of ports, descriptors, users and groups. */
const MOST = 0xffff_fffe;

/**
 * Reads a value as swtpm's options have it: `type=unixio,path=/run/x,mode=0600`. There is no way to write a comma in a part.
 * @param option as the caller wrote it, for messages
 * @throws DropinRefusal for a part that is not in `parts`, stands there twice or has not the right form
 */
export function parseOptionValue<const S extends Readonly<Record<string, PartKind>>>(
  option: string,
  text: string,
  parts: S,
): OptionValue<S> {
  const out = new Map<string, string | number | true>();
  for (const part of text.split(',')) {
    const equals = part.indexOf('=');
    const name = equals < 0 ? part : part.slice(0, equals);
    const kind = Object.hasOwn(parts, name) ? parts[name] : undefined;
    if (kind === undefined) {
      throw new DropinRefusal(`${option} has no part "${name}"; it takes ${Object.keys(parts).join(', ')}`);
    }
    if (out.has(name)) throw new DropinRefusal(`${option} names ${name} twice; name it once`);
    const value = equals < 0 ? undefined : part.slice(equals + 1);
    const read = readPart(kind, value);
    if (read === undefined) {
      throw new DropinRefusal(`${option}: ${name} is ${FORMS[kind]}, not "${value ?? ''}"`);
    }
    // `truncate=false` is as if it were not there.
    if (read !== false) out.set(name, read);
  }
  return Object.fromEntries(out) as OptionValue<S>;
}

const FORMS: Readonly<Record<PartKind, string>> = {
  flag: 'a word without a value',
  switch: 'a word alone, or with =true or =false',
  text: 'given with a value, as in NAME=VALUE',
  number: 'a whole number',
  mode: 'permission bits in octal, such as 0600',
};

/** @returns undefined where it has not the right form */
function readPart(kind: PartKind, value: string | undefined): string | number | boolean | undefined {
  switch (kind) {
    case 'flag':
      return value === undefined ? true : undefined;
    case 'switch':
      return value === undefined || value === 'true' ? true : value === 'false' ? false : undefined;
    case 'text':
      return value === undefined || value === '' || value.includes('\0') ? undefined : value;
    case 'number': {
      const number = value !== undefined && /^\d{1,10}$/.test(value) ? Number(value) : undefined;
      return number !== undefined && number <= MOST ? number : undefined;
    }
    case 'mode':
      return value !== undefined && /^0?[0-7]{1,3}$/.test(value) ? Number.parseInt(value, 8) : undefined;
  }
}
