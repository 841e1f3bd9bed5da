import { Socket } from 'node:net';
import type { Duplex } from 'node:stream';
import { receiveDescriptor } from 'vtpm-common/libc';
import { VtpmdError } from '../error.js';
import type { WorkerDescriptors } from '../worker/worker.js';
import { Channels, join } from './channels.js';

export interface RelayEvents {
  /** The worker in the VM ended with this status. */
  exited(status: number): void;
  /** The supervisor is gone. */
  abandoned(): void;
  /** The VM ended without a word, or said what no worker says. */
  failed(error: VtpmdError): void;
}

/**
 * The host's side of a worker in a VM: what a worker in a sandbox inherits and receives, this inherits and receives in
 * its place, and carries the bytes. It reads nothing of them but where a descriptor comes in.
 * @param port to the VM
 */
export function serveRelay(port: Duplex, fds: WorkerDescriptors, events: RelayEvents): void {
  const channels = new Channels(port, { exited: events.exited, failed: events.failed });
  join(new Socket({ fd: fds.manager }), channels.open());

  const control = new Socket({ fd: fds.control });
  // Before the first line is read: a descriptor is there before the line that announces it.
  control.on('data', () => {
    try {
      for (let fd = receiveDescriptor(fds.descriptors); fd !== undefined; ) {
        join(new Socket({ fd, allowHalfOpen: true }), channels.open());
        fd = receiveDescriptor(fds.descriptors);
      }
    } catch (error) {
      events.failed(VtpmdError.from(error));
    }
  });
  control.pipe(channels.control, { end: false });
  channels.control.pipe(control, { end: false });
  control.on('error', () => undefined);
  control.on('close', () => events.abandoned());
}
