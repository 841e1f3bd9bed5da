import { bootId } from 'vtpm-common';
import type { Entry } from './entry.js';
import type { Inheritance } from './handover/inheritance.js';
import { SUPERVISOR_ENDED } from './migration/outcome.js';
import { killAndWait } from './processes.js';
import { Vtpm } from './vtpm.js';
import type { VtpmList } from './vtpm-list.js';
import type { VtpmContext } from './vtpm-state.js';

/** Every vTPM of the list, as an earlier supervisor left it or the program before this one hands it over. */
export async function knownVtpms(context: VtpmContext, before: Inheritance | undefined): Promise<Vtpm[]> {
  const adopted = before ? await adoptAll(context, before) : new Map<string, Vtpm>();
  return context.list
    .all()
    .map((found) => adopted.get(found.id) ?? new Vtpm(context, afterLoss(context.list, found)));
}

async function adoptAll(
  context: VtpmContext,
  { state, descriptors }: Inheritance,
): Promise<Map<string, Vtpm>> {
  const adopted = new Map<string, Vtpm>();
  for (const before of state.vtpms) {
    const entry = context.list.get(before.id);
    if (entry) {
      adopted.set(entry.id, await Vtpm.adopt(context, entry, before, descriptors));
    } else {
      context.log.error(
        { vtpm: before.id },
        'a vTPM that was handed over is not in the list; its worker is ended',
      );
      await killAndWait(before.served?.worker?.processes ?? []);
    }
  }
  return adopted;
}

/**
 * The entry of a vTPM whose worker ended with its supervisor or its host. In the same boot the VM may still run, and
 * a TPM with fresh PCRs must not come back under it; after a reboot of the host no VM run is left.
 */
function afterLoss(list: VtpmList, found: Entry): Entry {
  // Of one whose migration is not settled only the manager can say what it is.
  if (found.runningInBoot === null || found.migration !== null) return found;
  const isSameBoot = found.runningInBoot === bootId().toString('hex');
  return list.update(found.id, {
    runningInBoot: null,
    crashed: isSameBoot ? SUPERVISOR_ENDED : null,
  });
}
