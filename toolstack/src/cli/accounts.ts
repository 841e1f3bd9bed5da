import { spawnSync } from 'node:child_process';
import { ToolstackError } from '../error.js';

/** Whom a socket is for. */
export interface SocketAccess {
  /** `uid:gid` in numbers; null where none was given. */
  readonly socketOwner: string | null;
  readonly socketMode: '0600' | '0660';
}

/**
 * Reads `--socket-owner` (`USER`, `USER:GROUP`, or numbers) and `--socket-mode`. Without a mode, a named group may use
 * the socket too. Names are looked up now: what they mean later does not move a vTPM to somebody else.
 * @throws ToolstackError `usage`
 */
export function parseSocketAccess(owner: string | undefined, mode: string | undefined): SocketAccess {
  if (mode !== undefined && mode !== '0600' && mode !== '0660') {
    throw new ToolstackError(
      'usage',
      `--socket-mode is 0600 (the owner) or 0660 (the group too), not "${mode}"; a vTPM is never for everybody`,
    );
  }
  if (owner === undefined) {
    if (mode === '0660') {
      throw new ToolstackError(
        'usage',
        '--socket-mode 0660 needs to know whose group: add --socket-owner USER:GROUP',
      );
    }
    return { socketOwner: null, socketMode: '0600' };
  }
  const [user = '', group, ...rest] = owner.split(':');
  if (user === '' || group === '' || rest.length > 0) {
    throw new ToolstackError('usage', `--socket-owner is USER or USER:GROUP, not "${owner}"`);
  }
  // passwd(5): name, password, uid, gid; group(5): name, password, gid.
  const account = lookUp('passwd', user);
  const uid = account?.[2] ?? numeric(user);
  const gid = group === undefined ? account?.[3] : (lookUp('group', group)?.[2] ?? numeric(group));
  if (uid === undefined) {
    throw new ToolstackError(
      'usage',
      `this host has no user "${user}"; getent passwd lists those that there are`,
    );
  }
  if (gid === undefined) {
    throw new ToolstackError(
      'usage',
      group === undefined
        ? `the group of user ${user} is not known; write --socket-owner ${user}:GROUP`
        : `this host has no group "${group}"; getent group lists those that there are`,
    );
  }
  return { socketOwner: `${uid}:${gid}`, socketMode: mode ?? (group === undefined ? '0600' : '0660') };
}

/** Through the C library's own order of sources (nsswitch.conf(5)): accounts of a directory service are found too. */
function lookUp(database: 'passwd' | 'group', name: string): string[] | undefined {
  const { status, stdout } = spawnSync('getent', ['--', database, name], { encoding: 'utf8' });
  return status === 0 ? stdout.split('\n')[0]?.split(':') : undefined;
}

function numeric(text: string): string | undefined {
  // 4294967295 means "leave it as it is" to chown(2).
  return /^\d{1,10}$/.test(text) && Number(text) < 4_294_967_295 ? String(Number(text)) : undefined;
}
