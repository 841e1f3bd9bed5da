import { socketFd } from 'vtpm-common';
import type { DoorEvents, Visit } from './doors.js';
import type { VmRun } from './vm-run.js';
import type { VtpmStatus } from './vtpm-status.js';
import { isOfTheDead } from './worker-start.js';

/** Who comes and goes at the doors of a vTPM, for the worker that it has then. */
export function doorEvents(
  status: Pick<VtpmStatus, 'state' | 'standIn' | 'attendant'>,
  run: VmRun,
): DoorEvents {
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
  { state, standIn }: Pick<VtpmStatus, 'state' | 'standIn'>,
  run: VmRun,
  visit: Visit,
): void {
  const { door, id, peer, socket } = visit;
  if (peer !== undefined) run.clientCame(peer);
  standIn?.pass(visit);
  if (state.kind !== 'running' && state.kind !== 'lost') return;
  try {
    state.worker.pass(socketFd(socket), { type: 'connection', door, id, peer });
  } catch (error) {
    // The next worker gets all that are open.
    if (!isOfTheDead(error)) throw error;
  }
}

/** The worker has sent what a VMM gave as its data channel. */
export function takeDataChannel(status: Pick<VtpmStatus, 'state' | 'standIn'>, run: VmRun): void {
  const { state, standIn } = status;
  const worker = standIn
    ? standIn.worker
    : state.kind === 'running' || state.kind === 'lost'
      ? state.worker
      : undefined;
  if (!worker || !('doors' in state)) return;
  const fd = worker.takeDescriptor();
  const visit = fd === undefined ? undefined : state.doors.keepDataChannel(fd);
  if (visit) passVisit(status, run, visit);
  else worker.send({ type: 'no-data-channel' });
}
