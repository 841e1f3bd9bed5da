import { closeSync, openSync, readdirSync, readlinkSync, writeSync } from 'node:fs';
import { CHECKPOINT_LAYOUT } from 'vtpm-common';

/** Overwrites the checkpoints of all vTPMs of a supervisor, as root can. @param supervisor its process id */
export function emptyCheckpoints(supervisor: number): void {
  const directory = `/proc/${supervisor}/fd`;
  for (const name of readdirSync(directory)) {
    const path = `${directory}/${name}`;
    if (!isCheckpointMemory(path)) continue;
    const fd = openSync(path, 'r+');
    writeSync(fd, Buffer.alloc(CHECKPOINT_LAYOUT.bytes), 0, CHECKPOINT_LAYOUT.bytes, 0);
    closeSync(fd);
  }
}

function isCheckpointMemory(path: string): boolean {
  try {
    return readlinkSync(path).includes('vtpm-checkpoint');
  } catch {
    // Closed since it was listed.
    return false;
  }
}
