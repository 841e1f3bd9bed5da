import { DropinRefusal } from './refusal.js';

/** `value`: the option takes one. `refused`: what the refusal says; such an option may have a value. */
export type OptionSpec =
  | { readonly takes: 'value' | 'nothing' }
  | { readonly refused: string; readonly takes: 'value' | 'nothing' };

export interface ParsedArguments {
  /** Values by long name, in the order in which they came; options without a value have ''. */
  readonly options: ReadonlyMap<string, readonly string[]>;
  readonly operands: readonly string[];
}

/**
 * Reads arguments as getopt_long(3) does: `--name value`, `--name=value`, `-n value`, `-nvalue`, `--` ends the options.
 * @param specs by long name @param short long names by their letter
 * @throws DropinRefusal for an unknown option, one without its value, and one that is refused
 */
export function parseArguments(
  args: readonly string[],
  specs: Readonly<Record<string, OptionSpec>>,
  short: Readonly<Record<string, string>>,
): ParsedArguments {
  const options = new Map<string, string[]>();
  const operands: string[] = [];
  const rest = [...args];
  for (let argument = rest.shift(); argument !== undefined; argument = rest.shift()) {
    if (argument === '--') {
      operands.push(...rest);
      break;
    }
    if (!argument.startsWith('-') || argument === '-') {
      operands.push(argument);
      continue;
    }
    const { shown, name, attached } = split(argument, short);
    const spec = Object.hasOwn(specs, name) ? specs[name] : undefined;
    if (!spec) throw new DropinRefusal(`the option ${shown} is not known here; --help names those that are`);
    if ('refused' in spec) throw new DropinRefusal(`${shown}: ${spec.refused}`);
    const values = options.get(name) ?? [];
    options.set(name, values);
    if (spec.takes === 'nothing') {
      if (attached !== undefined) throw new DropinRefusal(`${shown} takes no value`);
      values.push('');
      continue;
    }
    const value = attached ?? rest.shift();
    if (value === undefined) throw new DropinRefusal(`${shown} takes a value; give it one`);
    values.push(value);
  }
  return { options, operands };
}

function split(
  argument: string,
  short: Readonly<Record<string, string>>,
): { readonly shown: string; readonly name: string; readonly attached: string | undefined } {
  if (argument.startsWith('--')) {
    const equals = argument.indexOf('=');
    const end = equals < 0 ? undefined : equals;
    return {
      shown: argument.slice(0, end),
      name: argument.slice(2, end),
      attached: end === undefined ? undefined : argument.slice(end + 1),
    };
  }
  const letter = argument.slice(1, 2);
  return {
    shown: `-${letter}`,
    name: Object.hasOwn(short, letter) ? (short[letter] ?? '') : '',
    attached: argument.length > 2 ? argument.slice(2) : undefined,
  };
}
