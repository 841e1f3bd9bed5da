import { environmentName } from 'vtpm-common';
import { missingLayers } from 'vtpm-toolstack/supervisor/confinement';
import { WAIVABLE } from 'vtpm-toolstack/supervisor/layers';
import { say } from './story.js';

/**
 * Goes on without the layers of the sandbox that this machine cannot give, and says so: a container often has no cgroups
 * to give away. The service itself would refuse to start a worker.
 */
export async function waiveWhatIsMissing(): Promise<void> {
  const name = environmentName('waive-layers');
  const given = (process.env[name] ?? '').split(',').filter(Boolean);
  const missing = [...(await missingLayers())].filter(([layer]) => !given.includes(layer));
  const waivable = missing.filter(([layer]) => (WAIVABLE as readonly string[]).includes(layer));
  if (waivable.length === 0) return;
  const names = [...given, ...waivable.map(([layer]) => layer)].join(',');
  process.env[name] = names;
  say(`This machine does not give a worker's sandbox all of its layers; the quickstart goes on without:

${waivable.map(([layer, reason]) => `  ${layer}: ${reason}`).join('\n')}

The service itself refuses to start a worker then, unless you waive them by name in its config.json:
  { "waive-layers": "${names}" }`);
}
