import { randomInt } from 'node:crypto';
import type { CrashPoint } from './manager-crash-rig.js';

/** The manager's barriers, and how often it comes to each in one life under ManagerLoad, at least. */
const BARRIERS: Readonly<Record<string, number>> = {
  'load.audited': 1,
  'load.written': 1,
  'manager-before-commit': 12,
  'manager-after-commit': 12,
  'store.commit': 8,
  'store.committed': 8,
  'anchor.stated': 1,
  'anchor.counted': 1,
  'anchor.reconcile': 1,
  'anchor.reconciled': 1,
  'retire.audited': 1,
  'retire.noted': 1,
  'retire.written': 1,
  'trust.write': 1,
  'trust.written': 1,
  'audit.write': 3,
  'audit.written': 3,
  'audit.synced': 3,
  'rotation.intended': 1,
  'rotation.planned': 1,
  'rotation.defined': 1,
  'rotation.made': 1,
  'rotation.written': 1,
  'rotation.page': 1,
  'rotation.rekeyed': 1,
  'rotation.counted': 1,
  'rotation.adopted': 1,
  'index.overwritten': 1,
  'rotation.erased': 1,
  'rotation.ended': 1,
  'file.written': 3,
  'file.synced': 3,
  'file.renamed': 3,
};

export const MANAGER_BARRIERS = Object.keys(BARRIERS);

/** A life that ends before the TPM has counted what the anchor says: only the next start comes there. */
const LEFT_TO_RECONCILE: CrashPoint = { barrier: 'anchor.stated', count: 1 };

/**
 * Every barrier once, at a random one of its times, and random moments between. In random order, but for those that one
 * manager has to go through one after the other.
 */
export function crashPoints(): CrashPoint[][] {
  const groups = Object.entries(BARRIERS).map(([barrier, most]): CrashPoint[] => {
    const point = { barrier, count: 1 + randomInt(most) };
    return barrier.startsWith('anchor.reconcile') ? [LEFT_TO_RECONCILE, point] : [point];
  });
  const moments = Array.from({ length: 12 }, (): CrashPoint[] => [{ afterMs: 50 + randomInt(1500) }]);
  const order = [...groups, ...moments].map((group) => ({ group, at: randomInt(2 ** 32) }));
  return order.sort((a, b) => a.at - b.at).map(({ group }) => group);
}
