import { randomUUID } from 'node:crypto';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { DropinRefusal } from './refusal.js';
import type { ResolvedPlace } from './state-place.js';
import type { SupervisorLink } from './supervisor-link.js';
import { createToken, digestOf, newSecret, removeToken, type Token } from './token.js';

/** For whom a vTPM is made. */
export interface NewVm {
  readonly name: string | undefined;
  readonly uuid: string | undefined;
}

/**
 * Registers a vTPM and leaves its token in that place. The token comes first: a vTPM without one could be started by nobody.
 * @throws DropinRefusal
 */
export async function createVtpm(link: SupervisorLink, place: ResolvedPlace, vm: NewVm): Promise<Token> {
  refuseSwtpmState(place);
  const id = randomUUID();
  const token = { id, vmUuid: vm.uuid ?? randomUUID(), secret: newSecret() };
  try {
    createToken(place, token);
  } catch (error) {
    if (error instanceof DropinRefusal) throw error;
    const { code, message } = error as NodeJS.ErrnoException;
    throw new DropinRefusal(`the vTPM's token ${place.token} cannot be written (${code ?? message})`);
  }
  try {
    await link.request({
      type: 'create',
      id,
      vmUuid: token.vmUuid,
      secretSha256: digestOf(token.secret),
      place: place.place,
      name: nameFor(vm.name, id),
    });
    return token;
  } catch (error) {
    removeToken(place, token);
    throw error;
  }
}

/** What swtpm leaves in its directory, of TPM 2.0 and 1.2. */
const SWTPM_STATE = ['tpm2-00.permall', 'tpm-00.permall'];

/** A new TPM in the place of one that somebody used would be a loss that nobody sees at first. */
function refuseSwtpmState({ place, isFile }: ResolvedPlace): void {
  const found = isFile ? undefined : SWTPM_STATE.find((name) => existsSync(join(place, name)));
  if (found === undefined) return;
  throw new DropinRefusal(
    `${place} holds the state of a TPM of swtpm (${found}), and a new TPM does not take its place; docs/dropin.md says how it is brought in, for a new TPM move it away`,
  );
}

/** The vTPM's name from the VM's: 1 to 63 of a-z 0-9 . _ - that begin with a letter or digit. */
export function nameFor(vm: string | undefined, id: string): string {
  const name = (vm ?? '')
    .toLowerCase()
    .replace(/[^a-z0-9._-]+/g, '-')
    .replace(/^[^a-z0-9]+/, '')
    .slice(0, 54);
  return name === '' ? `swtpm-${id.slice(0, 8)}` : name;
}
