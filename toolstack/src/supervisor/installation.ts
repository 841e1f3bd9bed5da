import { lockFile, type Paths } from 'vtpm-common';
import type { SigningKey } from 'vtpm-proto';
import { ToolstackError } from '../error.js';
import { createDelegateKey, readDelegateKey } from './delegate-key.js';
import type { Inheritance } from './handover/inheritance.js';
import { VtpmList } from './vtpm-list.js';

/**
 * Holds the installation for this supervisor alone, until the process ends. Those that are handed over are held already, and
 * were never let go.
 * @returns the descriptors that hold the locks
 * @throws ToolstackError `in-use`
 */
export function takeLocks({ supervisor }: Paths, before: Inheritance | undefined): readonly number[] {
  const locks: number[] = [];
  // Another installation may have been given the same --run-dir.
  for (const [index, path] of [supervisor.lock, `${supervisor.socket}.lock`].entries()) {
    if (before) {
      locks.push(before.descriptors.takeFile(before.state.locks[index] ?? -1, path));
      continue;
    }
    const lock = lockFile(path);
    if (lock === undefined) {
      throw new ToolstackError('in-use', `another vtpm-supervisord holds ${path}; stop it first`);
    }
    locks.push(lock);
  }
  return locks;
}

/**
 * The list is made before the key: a key without a list means that the list was lost, and that is never taken for a
 * first start (I-9). @throws ToolstackError `corrupt` | `newer-format`
 */
export function openState(paths: Paths): { list: VtpmList; delegateKey: SigningKey } {
  const { vtpms, delegateKey: keyPath } = paths.supervisor;
  const key = readDelegateKey(keyPath);
  let list = VtpmList.open(vtpms);
  if (!list) {
    if (key)
      throw new ToolstackError(
        'corrupt',
        `${vtpms} is missing although ${keyPath} is there; restore it from a backup`,
      );
    list = VtpmList.create(vtpms);
  }
  if (!key && list.size > 0) {
    throw new ToolstackError(
      'corrupt',
      `${keyPath} is missing and the vTPMs in ${vtpms} are delegated to it; restore it from a backup`,
    );
  }
  return { list, delegateKey: key ?? createDelegateKey(keyPath) };
}
