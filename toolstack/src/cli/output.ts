/** Of a vTPM whose VMM gets the state itself. */
export const PLAIN_STATE =
  'PLAIN: whoever has the control door takes the whole state out in the clear, and can put an old one in its place';

/** Where a command writes its result and its remarks; tests put their own here. */
export interface Output {
  readonly isJson: boolean;
  /** The result: `value` as one JSON document with --json, `text` otherwise. */
  result(value: unknown, text: string): void;
  /** One of several results: `value` as one line of JSON with --json, `text` otherwise. */
  line(value: unknown, text: string): void;
  /** Something the reader should know that is not the result. */
  note(text: string): void;
}

export function createOutput(
  isJson: boolean,
  stdout: Pick<NodeJS.WritableStream, 'write'> = process.stdout,
  stderr: Pick<NodeJS.WritableStream, 'write'> = process.stderr,
): Output {
  return {
    isJson,
    result(value, text) {
      stdout.write(isJson ? `${JSON.stringify(value, null, 2)}\n` : `${printable(text)}\n`);
    },
    line(value, text) {
      stdout.write(isJson ? `${JSON.stringify(value)}\n` : `${printable(text)}\n`);
    },
    note(text) {
      stderr.write(`${printable(text)}\n`);
    },
  };
}

/**
 * Text with its control characters shown as `\\x1b`, line ends and tabs as they are. Reasons and log lines may hold what a
 * worker said, which its guest may own: it must not speak to the operator's terminal.
 */
export function printable(text: string): string {
  return text.replace(
    /[^\P{Cc}\n\t]/gu,
    (found) => `\\x${found.charCodeAt(0).toString(16).padStart(2, '0')}`,
  );
}

/** Columns as wide as their widest cell; the last one is not padded. */
export function table(head: readonly string[], rows: readonly (readonly string[])[]): string {
  const widths = head.map((title, column) =>
    Math.max(title.length, ...rows.map((row) => row[column]?.length ?? 0)),
  );
  return [head, ...rows]
    .map((row) =>
      row
        .map((cell, column) => (column === row.length - 1 ? cell : cell.padEnd(widths[column] ?? 0)))
        .join('  ')
        .trimEnd(),
    )
    .join('\n');
}

/** `name  value` lines; those without a value are left out. */
export function fields(pairs: readonly (readonly [string, string | number | null | undefined])[]): string {
  const shown = pairs.filter(([, value]) => value !== null && value !== undefined && value !== '');
  const width = Math.max(...shown.map(([name]) => name.length));
  return shown.map(([name, value]) => `${name.padEnd(width)}  ${String(value)}`).join('\n');
}

export function bytes(count: number | null): string {
  if (count === null) return '-';
  return count < 1024 ? `${count} B` : `${(count / 1024).toFixed(1)} KiB`;
}

/** An ISO time to the second, in UTC. */
export function time(iso: string | null): string {
  return iso === null ? '-' : iso.replace(/\.\d+Z$/, 'Z');
}
