import { ToolstackError } from '../../error.js';
import type { Context } from '../context.js';
import { fields } from '../output.js';

export interface SetFlags {
  readonly doors?: readonly string[];
  readonly startup?: string;
}

/** Changes a vTPM that is stopped. */
export async function set(
  nameOrId: string,
  { doors, startup }: SetFlags,
  { supervisor, output }: Context,
): Promise<void> {
  if (doors === undefined && startup === undefined) {
    throw new ToolstackError(
      'usage',
      `nothing to change; for example: vtpmctl set ${nameOrId} --doors tpm,tcti`,
    );
  }
  const vtpm = await supervisor.change(nameOrId, {
    ...(doors && { doors }),
    ...(startup !== undefined && { startup }),
  });
  output.result(
    vtpm,
    fields([
      ['changed', vtpm.name],
      ['doors', vtpm.doors?.join(', ')],
      ['startup', vtpm.startup],
    ]),
  );
}
