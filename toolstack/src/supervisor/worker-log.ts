import { closeSync, fstatSync, openSync, renameSync, writeSync } from 'node:fs';
import type { Readable } from 'node:stream';

/** A file of this size is put aside as `.1`, in place of the one before. */
const MAX_FILE_BYTES = 4 * 1024 * 1024;
/** A worker that belongs to its guest must not fill the disk or the supervisor's time: what is over is dropped. */
const MAX_BYTES_PER_MINUTE = 256 * 1024;

/** Appends a worker's standard error to the log that is its own at the time. Never throws: a full disk costs log lines, not a vTPM. */
export function keepLog(stream: Readable, path: () => string): void {
  let windowStart = performance.now();
  let written = 0;
  stream.on('error', () => undefined);
  stream.on('data', (chunk: Buffer) => {
    if (performance.now() - windowStart > 60_000) {
      windowStart = performance.now();
      written = 0;
    }
    const room = MAX_BYTES_PER_MINUTE - written;
    written += chunk.length;
    if (room <= 0) return;
    append(path(), room < chunk.length ? Buffer.concat([chunk.subarray(0, room), TOO_MUCH]) : chunk);
  });
}

const TOO_MUCH = Buffer.from('\n{"level":40,"msg":"too much output: the rest of this minute is dropped"}\n');

function append(path: string, content: Buffer): void {
  try {
    const fd = openSync(path, 'a', 0o600);
    try {
      writeSync(fd, content);
      if (fstatSync(fd).size > MAX_FILE_BYTES) renameSync(path, `${path}.1`);
    } finally {
      closeSync(fd);
    }
  } catch {
    // As said above.
  }
}
