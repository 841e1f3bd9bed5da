import { ToolstackError } from '../../error.js';
import type { Context } from '../context.js';
import { fields } from '../output.js';

export interface SetFlags {
  readonly doors?: readonly string[];
}

/** Changes a vTPM that is stopped. */
export async function set(
  nameOrId: string,
  { doors }: SetFlags,
  { supervisor, output }: Context,
): Promise<void> {
  if (doors === undefined) {
    throw new ToolstackError(
      'usage',
      `nothing to change; for example: vtpmctl set ${nameOrId} --doors tpm,tcti`,
    );
  }
  const vtpm = await supervisor.change(nameOrId, { doors });
  output.result(
    vtpm,
    fields([
      ['changed', vtpm.name],
      ['doors', vtpm.doors?.join(', ')],
    ]),
  );
}
