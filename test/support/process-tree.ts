import { readFileSync } from 'node:fs';
import { family } from '../bench/process-figures.js';

/** Process ids of all workers below a supervisor, and not of what confines them, which names them as well. */
export function workersBelow(supervisor: number): number[] {
  return family(supervisor).filter(
    (pid) => /^\S*\bnode\b.*\bvtpmd\b/.test(commandLine(pid)) && pid !== supervisor,
  );
}

function commandLine(pid: number): string {
  try {
    return readFileSync(`/proc/${pid}/cmdline`, 'utf8').replaceAll('\0', ' ');
  } catch {
    // It has ended meanwhile.
    return '';
  }
}
