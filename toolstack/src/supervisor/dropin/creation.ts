import { execFile } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import type { Paths } from 'vtpm-common';
import { isToolstackErrorCode, ToolstackError } from '../../error.js';
import type { DropinBinding, NewEntry } from '../entry.js';

export interface Creation {
  readonly id: string;
  readonly name: string;
  readonly vmUuid: string;
  readonly dropin: DropinBinding;
}

export type ArrivingVtpm = Omit<NewEntry, 'socketOwner' | 'dropin' | 'delegation' | 'delegationSignature'>;

const VTPMCTL = fileURLToPath(new URL('../../../bin/vtpmctl.js', import.meta.url));
const LIMIT_MS = 60_000;

/**
 * Registers a vTPM for whom the drop-in commands serve. Only the toolstack key can let this supervisor run a new vTPM, and it
 * is never in this process: vtpmctl, started for this one creation, signs and calls back.
 * @throws ToolstackError what vtpmctl says
 */
export function createVtpm(paths: Paths, { id, name, vmUuid, dropin }: Creation): Promise<void> {
  return runVtpmctl(paths, [
    ...['create', name, '--id', id, '--vm-uuid', vmUuid],
    ...['--doors', 'control', '--startup', 'none', '--dropin', JSON.stringify(dropin)],
  ]);
}

/** Registers a vTPM that comes from another host. @throws ToolstackError what vtpmctl says */
export function createArriving(
  paths: Paths,
  { id, name, vmUuid, isolation, autostart, startup, doors, stateBlobs, socketMode, migration }: ArrivingVtpm,
): Promise<void> {
  return runVtpmctl(paths, [
    ...['create', '--id', id, '--vm-uuid', vmUuid, '--isolation', isolation, '--startup', startup],
    ...['--doors', doors.join(','), '--state-blobs', stateBlobs, '--socket-mode', socketMode],
    ...(autostart ? ['--autostart'] : []),
    ...['--arriving', JSON.stringify(migration)],
    // Another host chose it: whatever it is, it is no option.
    ...['--', name],
  ]);
}

/** Destroys one that was not finished. @throws ToolstackError what vtpmctl says */
export function deleteVtpm(paths: Paths, id: string): Promise<void> {
  return runVtpmctl(paths, ['delete', id, '--yes']);
}

function runVtpmctl(paths: Paths, command: readonly string[]): Promise<void> {
  const args = [VTPMCTL, '--home', paths.home, '--run-dir', paths.run, '--json', ...command];
  return new Promise((resolve, reject) => {
    execFile(process.execPath, args, { timeout: LIMIT_MS, cwd: paths.home }, (error, _stdout, stderr) => {
      if (error) reject(refusalOf(stderr, error));
      else resolve();
    });
  });
}

function refusalOf(stderr: string, cause: Error): ToolstackError {
  try {
    const { error } = JSON.parse(stderr) as { error?: { code?: unknown; message?: unknown } };
    if (isToolstackErrorCode(error?.code) && typeof error.message === 'string') {
      return new ToolstackError(error.code, error.message);
    }
  } catch {
    // It did not come to say it in its own words.
  }
  return new ToolstackError('internal', `vtpmctl ended without a reason (${cause.message})`, {
    cause,
  });
}
