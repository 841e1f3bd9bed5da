import { spawnSync } from 'node:child_process';
import { DropinRefusal } from './refusal.js';

/** Becomes another user, with that user's groups, for `--runas`. @throws DropinRefusal where this one may not */
export function becomeUser(user: string | undefined): void {
  const { getuid, setuid, setgid } = process;
  // @types/node does not know it.
  const { initgroups } = process as { initgroups?: (user: string | number, group: number) => void };
  if (user === undefined || !getuid || !setuid || !setgid || !initgroups) return;
  const known = /^\d+$/.test(user) ? Number(user) : user;
  if (known === getuid() || (known === 'root' && getuid() === 0)) return;
  try {
    const gid = primaryGroup(user);
    initgroups(known, gid);
    setgid(gid);
    setuid(known);
  } catch (error) {
    const { code, message } = error as NodeJS.ErrnoException;
    throw new DropinRefusal(`--runas ${user}: this process cannot become that user (${code ?? message})`);
  }
}

function primaryGroup(user: string): number {
  const { status, stdout } = spawnSync('getent', ['--', 'passwd', user], { encoding: 'utf8' });
  // passwd(5): name, password, uid, gid.
  const gid = status === 0 ? Number(stdout.split(':')[3]) : Number.NaN;
  if (!Number.isInteger(gid)) throw new Error('there is no such user');
  return gid;
}
