import { ToolstackError } from '../../error.js';
import type { VmRun } from '../vm-run.js';
import type { VtpmStatus } from '../vtpm-status.js';
import type { KeptDescriptors } from './descriptors.js';
import type { VtpmHandOver } from './state.js';

/** What the next program needs to know of a vTPM. Only while it is held. @throws ToolstackError `busy` */
export function handOverVtpm(
  { state, entry, lingering, vmm }: VtpmStatus,
  run: VmRun | undefined,
  kept: KeptDescriptors,
): VtpmHandOver {
  const common = {
    id: entry.id,
    lingering: lingering.map(({ pid, startTime }) => ({ pid, startTime })),
    vmm: vmm ?? null,
  };
  switch (state.kind) {
    case 'stopped':
    case 'crashed':
      return { ...common, state: state.kind, reason: state.reason, served: null };
    case 'running':
    case 'restarting':
    case 'lost': {
      if (!run) break;
      const reason = state.kind === 'running' ? null : state.reason;
      const worker = state.worker?.handOver(kept) ?? null;
      const served = { run: run.handOver(kept), doors: state.doors.handOver(kept), worker };
      return { ...common, state: state.kind, reason, served };
    }
    case 'moved':
    case 'migrating':
    case 'arriving':
      if ('doors' in state || ('worker' in state && state.worker)) break;
      // Its entry says the rest.
      return { ...common, state: 'stopped', reason: null, served: null };
  }
  throw new ToolstackError('busy', `vTPM ${entry.name} is ${state.kind}; try again later`);
}
