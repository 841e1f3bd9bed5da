import { VERSION } from 'vtpm-common';
import type { Health } from './admin/health.js';
import { time } from './admin/route.js';
import type { Enrolment } from './enrolment.js';
import type { ManagerError } from './error.js';
import type { MetricsState } from './metrics.js';
import type { Rotation } from './rotation.js';
import type { Service } from './service.js';
import type { AnchorState } from './store/index.js';

/**
 * `starting`: the sockets answer, the store is not open yet. `locked`: it cannot be used, and `reason` says why; the
 * admin plane stays up so that the operator can help.
 */
export type ManagerState =
  | { readonly status: 'starting' }
  | { readonly status: 'locked'; readonly reason: ManagerError }
  | { readonly status: 'ready'; readonly service: Service };

/** Live ones and tombstones; null where the store is not open. */
export function vtpmsOf(state: ManagerState): number | null {
  if (state.status !== 'ready') return null;
  const { live, retired, moved } = state.service.registry.census;
  return live + retired + moved;
}

/** What GET /health says. @param instance of this process, hex */
export function describeHealth(state: ManagerState, enrolment: Enrolment, instance: string): Health {
  const { managerId, storeId, tpm } = enrolment;
  return {
    status: state.status,
    ...(state.status === 'locked' ? { reason: state.reason.code, message: state.reason.message } : {}),
    version: VERSION,
    managerId,
    storeId,
    tpm: {
      kind: tpm.kind,
      path: tpm.path,
      manufacturer: tpm.manufacturer,
      hardwareProtected: tpm.kind === 'device',
    },
    pcrSelection: tpm.root.pcrSelection,
    vtpms: vtpmsOf(state),
    ...(state.status === 'ready' && { anchor: describeAnchor(state.service.storeState.anchoring) }),
    instance,
  };
}

/** What GET /metrics counts at the moment it is asked. */
export function describeMetrics(state: ManagerState, rotation: Rotation | undefined): MetricsState {
  const service = state.status === 'ready' ? state.service : undefined;
  const current = service && rotation;
  const { pendingSince, stalled } = service?.storeState.anchoring ?? {};
  return {
    isReady: service !== undefined,
    lockedReason: state.status === 'locked' ? state.reason.code : undefined,
    vtpms: service?.registry.census,
    connectedWorkers: service?.registry.connected,
    storeRecords: service?.storeState.records,
    treeBytes: service?.storeState.treeBytes,
    auditEntries: service && Number(service.audit.head.length),
    anchorPendingSince: secondsOf(pendingSince),
    anchorStalledSince: secondsOf(stalled?.since),
    isRotating: current?.isUnfinished,
    rootKeyGeneration: current?.enrolment.tpm.root.generation,
    erasurePendingSince: secondsOf(current?.erasure()?.since),
  };
}

function describeAnchor({ pendingSince, stalled }: AnchorState): NonNullable<Health['anchor']> {
  return {
    pendingSince: time(pendingSince ?? 0),
    stalledSince: time(stalled?.since ?? 0),
    ...(stalled && { reason: stalled.reason.code, message: stalled.reason.message }),
  };
}

function secondsOf(milliseconds: number | undefined): number | undefined {
  return milliseconds === undefined ? undefined : milliseconds / 1000;
}
