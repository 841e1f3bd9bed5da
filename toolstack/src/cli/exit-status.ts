import type { ToolstackErrorCode } from '../error.js';

/** The exit statuses of vtpmctl; `--help` and the operator's guide list them. */
export const EXIT = { ok: 0, failed: 1, usage: 2, notRunning: 3, locked: 4 } as const;

export function exitStatus(code: ToolstackErrorCode): number {
  switch (code) {
    case 'usage':
      return EXIT.usage;
    case 'not-running':
    case 'manager-unreachable':
      return EXIT.notRunning;
    case 'locked':
      return EXIT.locked;
    default:
      return EXIT.failed;
  }
}
