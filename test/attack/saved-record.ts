import { randomBytes } from 'node:crypto';
import type { KeyHierarchy } from 'vtpm-manager/keys/index';
import { applySave, encodeRecord, newRecord } from 'vtpm-manager/records/index';
import type { SaveBody } from 'vtpm-proto';
import { type TestVtpm, testVtpm } from '../support/worker-client.js';

/** A vTPM that was saved once, with every kind of part, and the bytes of its record. */
export function savedRecord(keys: KeyHierarchy): { vtpm: TestVtpm; permanent: Buffer; bytes: Buffer } {
  const vtpm = testVtpm();
  const session = {
    sessionId: randomBytes(16),
    workerKey: randomBytes(32),
    lastSequence: 0n,
    lastDigest: Buffer.alloc(0),
    imageDigest: randomBytes(32),
    isolation: 'sandbox',
    verbs: [],
  };
  const load = {
    vmRunId: randomBytes(16),
    bootId: randomBytes(16),
    session,
    libtpmsVersion: '0.9.2',
    keepsVolatile: true,
  };
  const empty = newRecord(keys, { vtpmUuid: vtpm.uuid, vmUuid: vtpm.vmUuid }, load, 1n);
  const permanent = randomBytes(6_000);
  const body: SaveBody = {
    libtpmsVersion: '0.9.2',
    permanent,
    volatile: randomBytes(600),
    use: { action: 'SUSPEND', digest: randomBytes(32) },
    journal: { sequence: 1n, request: randomBytes(100), response: randomBytes(100) },
  };
  const saved = applySave(keys, empty, { body, sequence: 1n, digest: randomBytes(32), now: 2n });
  return { vtpm, permanent, bytes: encodeRecord(keys, saved) };
}
