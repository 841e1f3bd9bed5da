import { CONFIG_KEYS, type Settings } from 'vtpm-common';
import type { Context } from '../context.js';
import { table } from '../output.js';

const MEANING: Readonly<Record<'home' | 'run-dir', string>> = {
  home: 'directory of the installation',
  'run-dir': 'directory of its sockets',
};

/** Every setting, its value and where the value comes from. */
export function showConfig({ configuration, output }: Context): void {
  const { settings, sources, paths } = configuration;
  const rows = (Object.keys(settings) as (keyof Settings)[]).map((key) => ({
    key,
    value: settings[key],
    source: sources[key],
    meaning: key === 'home' || key === 'run-dir' ? MEANING[key] : CONFIG_KEYS[key].help,
  }));
  output.result(
    { file: paths.config, settings: Object.fromEntries(rows.map(({ key, ...rest }) => [key, rest])) },
    `${table(
      ['KEY', 'VALUE', 'FROM', 'MEANING'],
      rows.map(({ key, value, source, meaning }) => [key, String(value), source, meaning]),
    )}\n\nfile: ${paths.config}`,
  );
}
