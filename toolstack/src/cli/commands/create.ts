import { randomUUID } from 'node:crypto';
import { join } from 'node:path';
import { checkSocketPath } from 'vtpm-common';
import { ToolstackError } from '../../error.js';
import { parseSocketAccess } from '../accounts.js';
import type { Context } from '../context.js';
import { isUuid, isVtpmName } from '../inventory.js';
import { fields, PLAIN_STATE } from '../output.js';
import type { DropinBinding } from '../supervisor-api.js';
import { delegate, readToolstackKey } from '../toolstack-key.js';

export interface CreateFlags {
  /** Id of a vTPM that the manager keeps and that has no name here. */
  readonly adopt?: string;
  /** Of the drop-in commands: the id that the token has, and the binding to it as JSON. */
  readonly id?: string;
  readonly dropin?: string;
  /** Of the supervisor, for a vTPM that comes from another host: the migration as JSON. */
  readonly arriving?: string;
  readonly vmUuid?: string;
  readonly isolation?: string;
  readonly autostart?: boolean;
  readonly startup?: string;
  readonly doors?: readonly string[];
  readonly stateBlobs?: string;
  readonly socketOwner?: string;
  readonly socketMode?: string;
}

/** Registers a vTPM; its TPM comes into being with the first start. */
export async function create(name: string, flags: CreateFlags, context: Context): Promise<void> {
  const { configuration, output, supervisor } = context;
  if (!isVtpmName(name)) {
    throw new ToolstackError(
      'usage',
      `a name has 1 to 63 of a-z, 0-9, ".", "_" and "-", begins with a letter or digit and is no UUID; "${name}" is not one`,
    );
  }
  if (flags.vmUuid !== undefined && !isUuid(flags.vmUuid)) {
    throw new ToolstackError('usage', `--vm-uuid takes a UUID, not "${flags.vmUuid}"`);
  }
  try {
    checkSocketPath(join(configuration.paths.supervisor.doors, name, 'tcti.sock.ctrl'));
  } catch (cause) {
    throw new ToolstackError('usage', `${(cause as Error).message}, or a shorter name`, { cause });
  }
  const access = parseSocketAccess(flags.socketOwner, flags.socketMode);
  const key = readToolstackKey(configuration.paths);
  const { delegateKey } = await supervisor.health();
  const { id, vmUuid } = await namesOf(flags, context);
  const vtpm = await supervisor.create({
    id,
    name,
    vmUuid,
    isolation: flags.isolation ?? configuration.settings.isolation,
    autostart: flags.autostart === true,
    // Firmware that finds a TPM started up measures nothing.
    startup: flags.startup ?? (flags.doors?.includes('control') ? 'none' : 'clear'),
    ...(flags.doors && { doors: flags.doors }),
    ...(flags.stateBlobs && { stateBlobs: flags.stateBlobs }),
    ...access,
    ...(flags.dropin !== undefined && { dropin: JSON.parse(flags.dropin) as DropinBinding }),
    ...(flags.arriving !== undefined && { migration: JSON.parse(flags.arriving) as object }),
    ...delegate(
      key,
      { id, vmUuid, delegateKey },
      {
        isPlain: flags.stateBlobs === 'plain',
        exists: flags.arriving !== undefined,
      },
    ),
  });
  output.result(
    vtpm,
    `${fields([
      ['created', vtpm.name],
      ['id', vtpm.id],
      ['VM', vtpm.vmUuid],
      ['state blobs', flags.stateBlobs === 'plain' ? PLAIN_STATE : null],
    ])}\nnext: vtpmctl start ${vtpm.name}`,
  );
}

/** A vTPM that has state keeps its id, and the VM it belongs to. */
async function namesOf(
  { adopt, id = randomUUID(), vmUuid }: CreateFlags,
  { manager }: Context,
): Promise<{ readonly id: string; readonly vmUuid: string }> {
  if (adopt === undefined) return { id, vmUuid: vmUuid?.toLowerCase() ?? randomUUID() };
  if (vmUuid !== undefined) {
    throw new ToolstackError('usage', '--adopt takes the VM that the vTPM belongs to; leave --vm-uuid out');
  }
  if (!isUuid(adopt)) throw new ToolstackError('usage', `--adopt takes the id of a vTPM, not "${adopt}"`);
  const kept = await manager.vtpm(adopt.toLowerCase());
  if (kept.kind === 'live') return { id: kept.id, vmUuid: kept.vmUuid };
  const why =
    kept.kind === 'moved'
      ? `lives on ${kept.movedTo ?? 'another host'}; migrate it back from there`
      : 'was retired for good; create a new one';
  throw new ToolstackError('bad-request', `vTPM ${kept.id} ${why}`);
}
