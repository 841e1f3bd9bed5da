import { socketFd } from 'vtpm-common';
import type { DoorEvents, Visit } from './doors.js';
import type { VmRun } from './vm-run.js';
import type { VtpmStatus } from './vtpm-status.js';
import { isOfTheDead } from './worker-start.js';

/** Who comes and goes at the doors of a vTPM, for the worker that it has then. */
export function doorEvents(status: Pick<VtpmStatus, 'state' | 'attendant'>, run: VmRun): DoorEvents {
  return {
    connected: (visit) => passVisit(status, run, visit),
    disconnected: ({ id, door }) => status.attendant?.disconnected(id, door),
    peerGone: (peer) => {
      run.clientGone(peer);
      if ('worker' in status.state) status.state.worker?.send({ type: 'peer-gone', peer });
    },
  };
}

/** A connection waits while there is no worker: the next one gets all that are open. */
export function passVisit(
  { state }: Pick<VtpmStatus, 'state'>,
  run: VmRun,
  { door, id, peer, socket }: Visit,
): void {
  if (peer !== undefined) run.clientCame(peer);
  if (state.kind !== 'running' && state.kind !== 'lost') return;
  try {
    state.worker.pass(socketFd(socket), { type: 'connection', door, id, peer });
  } catch (error) {
    // The next worker gets all that are open.
    if (!isOfTheDead(error)) throw error;
  }
}

/** The worker has sent what a VMM gave as its data channel. */
export function takeDataChannel({ state }: Pick<VtpmStatus, 'state'>, run: VmRun): void {
  if (state.kind !== 'running' && state.kind !== 'lost') return;
  const fd = state.worker.takeDescriptor();
  const visit = fd === undefined ? undefined : state.doors.keepDataChannel(fd);
  if (visit) passVisit({ state }, run, visit);
  else state.worker.send({ type: 'no-data-channel' });
}
