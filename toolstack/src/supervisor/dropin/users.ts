import { spawnSync } from 'node:child_process';
import { ToolstackError } from '../../error.js';

/**
 * The uids that the setting `dropin-users` names, beside root and the supervisor's own user, who are always served.
 * @throws ToolstackError `usage` where this host has no such user
 */
export function dropinUids(setting: string): ReadonlySet<number> {
  const names = setting.split(/[, ]+/).filter((name) => name !== '');
  return new Set([0, process.getuid?.() ?? 0, ...names.map(uidOf)]);
}

function uidOf(name: string): number {
  const { status, stdout } = spawnSync('getent', ['--', 'passwd', name], { encoding: 'utf8' });
  // passwd(5): name, password, uid.
  const uid = status === 0 ? stdout.split(':')[2] : name;
  if (uid !== undefined && /^\d{1,10}$/.test(uid)) return Number(uid);
  throw new ToolstackError(
    'usage',
    `dropin-users names "${name}", and this host has no such user; getent passwd lists those that there are`,
  );
}
