import { DropinRefusal } from '../../dropin/refusal.js';
import { parseStateUri, resolvePlace } from '../../dropin/state-place.js';
import { digestOf, newSecret, writeToken } from '../../dropin/token.js';
import { ToolstackError } from '../../error.js';
import { parseSocketAccess } from '../accounts.js';
import type { Context } from '../context.js';
import { fields } from '../output.js';

export interface DropinFlags {
  readonly user?: string;
  readonly remove?: boolean;
}

/**
 * Lets the drop-in command swtpm start a vTPM, by a new token in a directory: for a vTPM that there is already, and for one
 * whose directory was moved or whose token was lost. The token before is void then.
 */
export async function dropin(
  nameOrId: string,
  directory: string | undefined,
  { user, remove }: DropinFlags,
  { supervisor, output }: Context,
): Promise<void> {
  const vtpm = await supervisor.vtpm(nameOrId);
  if (remove) {
    const changed = await supervisor.change(vtpm.id, { dropin: null });
    output.result(changed, `${fields([['changed', vtpm.name]])}\nnext: vtpmctl start ${vtpm.name}`);
    return;
  }
  if (directory === undefined) {
    throw new ToolstackError('usage', 'name the directory that the token goes to, or --remove');
  }
  const place = refusing(() => resolvePlace(parseStateUri('the directory', directory)));
  const [uid = 0, gid = 0] =
    user === undefined
      ? [process.getuid?.(), process.getgid?.()]
      : (parseSocketAccess(user, undefined).socketOwner?.split(':').map(Number) ?? []);
  const secret = newSecret();
  const doors = [...new Set([...(vtpm.doors ?? []), 'control'])];
  const changed = await supervisor.change(vtpm.id, {
    doors,
    // The VM's firmware sends it, or swtpm where its caller says so.
    startup: 'none',
    dropin: { secretSha256: digestOf(secret), uid, place: place.place },
  });
  const owner = uid === process.getuid?.() ? undefined : { uid, gid };
  refusing(() => writeToken(place, { id: vtpm.id, vmUuid: vtpm.vmUuid, secret }, owner));
  output.result(
    changed,
    fields([
      ['changed', vtpm.name],
      ['token', place.token],
      ['user', uid],
    ]),
  );
}

function refusing<T>(work: () => T): T {
  try {
    return work();
  } catch (error) {
    if (error instanceof DropinRefusal) throw new ToolstackError('usage', error.message, { cause: error });
    throw error;
  }
}
