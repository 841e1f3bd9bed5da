import { randomUUID } from 'node:crypto';
import { DropinRefusal } from './refusal.js';
import type { ResolvedPlace } from './state-place.js';
import type { SupervisorLink } from './supervisor-link.js';
import { digestOf, newSecret, removeToken, type Token, writeToken } from './token.js';

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
  const id = randomUUID();
  const token = { id, vmUuid: vm.uuid ?? randomUUID(), secret: newSecret() };
  try {
    writeToken(place, token);
  } catch (error) {
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
    removeToken(place);
    throw error;
  }
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
