import type { Settings } from 'vtpm-common';
import { ToolstackError } from '../../error.js';
import type { Description } from './description.js';

type Weighed = Pick<Description, 'isolation' | 'doors' | 'stateBlobs'>;
type Deciding = Pick<Settings, 'isolation' | 'migrations-may'>;

/** What a vTPM may bring only where this host says so: in the words of the setting `migrations-may`, and in those of an operator. */
const WEAKER: readonly [
  string,
  string,
  (description: Weighed, settings: Pick<Settings, 'isolation'>) => boolean,
][] = [
  [
    'isolation-none',
    'has isolation none, and a worker without a sandbox can do here what the supervisor can',
    ({ isolation }, settings) => isolation === 'none' && settings.isolation !== 'none',
  ],
  [
    'mssim',
    'has the door mssim, which every user of this host can open',
    ({ doors }) => doors.includes('mssim'),
  ],
  [
    'plain',
    'has state blobs that are plain: its VMM here could take its secrets out',
    ({ stateBlobs }) => stateBlobs === 'plain',
  ],
];

/**
 * How well a vTPM is protected on a host is for that host to say, and not for the one that sends it.
 * @param before how it was run here @throws ToolstackError `migration-refused`
 */
export function checkProtection(description: Description, settings: Deciding, before?: Weighed): void {
  const allowed = settings['migrations-may'].split(',').map((what) => what.trim());
  for (const [name, what, isSo] of WEAKER) {
    const isAllowed = allowed.includes(name) || (before !== undefined && isSo(before, settings));
    if (isAllowed || !isSo(description, settings)) continue;
    throw new ToolstackError(
      'migration-refused',
      `vTPM ${description.name} ${what}; to take it in, put ${name} into migrations-may of this host's config.json and start ` +
        'its supervisor again',
    );
  }
}
