import { randomBytes, randomUUID } from 'node:crypto';
import { createLogger } from 'vtpm-common';
import { readApprovals } from 'vtpm-manager/approvals-file';
import { readEnrolment } from 'vtpm-manager/enrolment';
import type { KeyHierarchy } from 'vtpm-manager/keys/index';
import { openPlatform } from 'vtpm-manager/platform';
import { applySave, encodeRecord, newRecord } from 'vtpm-manager/records/index';
import { openAnchoredStore, openLmdbStore } from 'vtpm-manager/store/index';
import { unlock } from 'vtpm-manager/unlock';
import { uuidToBytes } from 'vtpm-proto';
import type { ManagerInstallation } from './manager-process.js';

const log = createLogger('test', { 'log-level': 'silent', 'log-format': 'json' });
/** Writes of a commit: as many as one takes. */
const BATCH = 256;

/**
 * Puts vTPMs into the store of a manager that does not run: real records under its keys, written through StateStore and
 * anchored, as if each had been loaded and saved once.
 * @param tpm path of the TPM's socket
 * @returns their uuids
 */
export async function fillStore(
  { paths }: ManagerInstallation,
  tpm: string,
  count: number,
  stateBytes: number,
): Promise<string[]> {
  const { platform, keys, enrolment } = await unlocked(paths, tpm);
  const raw = await openLmdbStore({
    directory: paths.store,
    create: false,
    sandbox: false,
    log,
    onLost: (error) => {
      throw error;
    },
  });
  const store = await openAnchoredStore(raw, {
    keys,
    counter: platform.tpm.anchorCounter(enrolment.tpm, keys.anchorAuth),
    windowMs: 3_600_000,
    log,
    auditHead: () => store.auditAtOpen,
  });
  try {
    const state = randomBytes(stateBytes);
    // In order LMDB fills page after page.
    const ids = Array.from({ length: count }, () => randomUUID()).sort();
    let written: Promise<unknown> = Promise.resolve();
    for (let at = 0; at < count; at += BATCH) {
      const batch = ids.slice(at, at + BATCH).map((id) => ({ id, bytes: savedRecord(keys, id, state) }));
      await written;
      written = Promise.all(batch.map(({ id, bytes }) => store.write(`vtpm/${id}`, 0, bytes)));
    }
    await written;
    return ids;
  } finally {
    await store.close();
    keys.wipe();
    await platform.close();
  }
}

/** What the TPM's counter of a manager that does not run shows: how often it has counted. */
export async function anchorCount({ paths }: ManagerInstallation, tpm: string): Promise<bigint> {
  const { platform, keys, enrolment } = await unlocked(paths, tpm);
  try {
    return await platform.tpm.anchorCounter(enrolment.tpm, keys.anchorAuth).read();
  } finally {
    keys.wipe();
    await platform.close();
  }
}

async function unlocked(paths: ManagerInstallation['paths'], tpm: string) {
  const platform = await openPlatform({ kind: 'unix', path: tpm }, paths, log, false, 60_000);
  return { platform, ...(await unlock(platform.tpm, paths, readEnrolment(paths), readApprovals(paths))) };
}

function savedRecord(keys: KeyHierarchy, id: string, permanent: Buffer): Buffer {
  const session = {
    sessionId: randomBytes(16),
    workerKey: randomBytes(32),
    lastSequence: 0n,
    lastDigest: new Uint8Array(0),
    imageDigest: randomBytes(32),
    isolation: 'sandbox',
    verbs: [],
  };
  const names = { vtpmUuid: uuidToBytes(id), vmUuid: randomBytes(16) };
  const libtpmsVersion = '0.9.2';
  const load = {
    vmRunId: randomBytes(16),
    bootId: randomBytes(16),
    session,
    libtpmsVersion,
    keepsVolatile: false,
  };
  const record = newRecord(keys, names, load, 1n);
  const save = { body: { libtpmsVersion, permanent }, sequence: 1n, digest: randomBytes(32), now: 1n };
  return encodeRecord(keys, applySave(keys, record, save));
}
