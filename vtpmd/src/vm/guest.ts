import { closeSync } from 'node:fs';
import { Socket } from 'node:net';
import type { Duplex } from 'node:stream';
import { sendDescriptor, socketPair } from 'vtpm-common/libc';
import type { VtpmdError } from '../error.js';
import type { WorkerEnds } from '../worker/worker.js';
import { Channels, join } from './channels.js';

export interface GuestEvents {
  /** The manager link is there: the worker can run. `end` tells the host its status; nothing follows. Called once. */
  run(ends: WorkerEnds, end: (status: number) => void): void;
  /** The host is gone, or what it sends is not what it should be. */
  failed(error: VtpmdError): void;
}

/**
 * The worker's surroundings inside of a VM: a channel from the host becomes one end of a socket pair, so the worker
 * receives descriptors as it does in a sandbox. The first one is its link to the manager.
 * @param port to the relay on the host
 */
export function serveGuest(port: Duplex, events: GuestEvents): void {
  const [passing, descriptors] = socketPair();
  let isRunning = false;
  const channels = new Channels(port, {
    opened(channel) {
      const theirs = joinToPair(channel);
      if (isRunning) {
        sendDescriptor(passing, theirs);
        closeSync(theirs);
        return;
      }
      isRunning = true;
      events.run({ manager: theirs, control: channels.control, descriptors }, (status) =>
        channels.exit(status),
      );
    },
    failed: events.failed,
  });
}

/** @returns the descriptor that stands for the channel */
function joinToPair(channel: Duplex): number {
  const [ours, theirs] = socketPair();
  // The worker closes what it has ended: it has nothing that it only reads on.
  join(new Socket({ fd: ours, allowHalfOpen: false }), channel);
  return theirs;
}
