import { existsSync, readdirSync, renameSync, rmSync } from 'node:fs';
import { basename, dirname, join } from 'node:path';
import {
  barrier,
  type Logger,
  type Paths,
  privateDirectory,
  syncDirectory,
  writeFileDurably,
} from 'vtpm-common';
import { bytesEqual, uuidToText } from 'vtpm-proto';
import { readApprovals } from '../approvals-file.js';
import { type AuditLog, createAuditLog } from '../audit/index.js';
import { isMissingOrEmpty, type UnverifiedEnrolment, unfinishedPath, unverified } from '../enrolment.js';
import { ManagerError } from '../error.js';
import { type KeyHierarchy, wipe } from '../keys/index.js';
import { acquireLock } from '../lock.js';
import { ACCEPTANCE_KEY, acceptanceRecord } from '../ownership/acceptance.js';
import { openPlatform, type Platform } from '../platform.js';
import {
  encodeRecord,
  KIND_NAMES,
  type KindName,
  restoredRecord,
  restoredTombstone,
  type VtpmRecord,
  vtpmKey,
} from '../records/index.js';
import { unbox } from '../recover.js';
import type { AnchorCounter } from '../root-tpm/index.js';
import { type AnchoredStore, createAnchoredStore, withLmdbStore } from '../store/index.js';
import { createTrustStore } from '../trust/trust-configuration.js';
import { hierarchy, unlock } from '../unlock.js';
import { parse } from './format.js';
import { Parallel } from './parallel.js';
import { type BackupStart, checkRecipient, openEntry, type ReadEntry, readBackup } from './read.js';

export interface RebuildOptions {
  readonly paths: Paths;
  readonly log: Logger;
  readonly storeSandbox: boolean;
  readonly tpmDeadlineMs: number;
  readonly file: string;
  /** Of the operator, 32 bytes; wiped. */
  readonly secretKey: Buffer;
  /** Ed25519 public key, 32 bytes: the trust configuration is not in a backup. */
  readonly toolstackKey: Uint8Array;
  /** 32 bytes, wiped: where the TPM is lost too, or its root key was rotated since. */
  readonly recoveryKey: Buffer | undefined;
}

export interface RebuildResult {
  readonly managerId: string;
  readonly storeId: string;
  readonly tpm: {
    readonly kind: string;
    readonly path: string;
    readonly manufacturer: string;
    readonly firmwareVersion: string;
  };
  readonly pcrSelection: string;
  readonly vtpms: readonly {
    readonly id: string;
    readonly vmUuid: string;
    readonly generation: bigint;
    readonly kind: KindName;
  }[];
  /** The store is not counted by any TPM: it starts after `recover` with the recovery key. */
  readonly needsRecover: boolean;
}

/**
 * Makes an installation again whose disk is lost, from its backup and its TPM: the same manager, the same store id, every
 * vTPM of the backup at the state it had there, every tombstone. Nothing starts before all of it is there: the enrolment
 * comes last, and a rebuild that was interrupted begins anew.
 * @throws ManagerError `already-initialised` where anything is left of an installation, `wrong-manager`, the TPM's
 */
export async function rebuild(options: RebuildOptions): Promise<RebuildResult> {
  const paths = options.paths.manager;
  privateDirectory(paths.directory);
  const release = acquireLock(paths);
  try {
    checkNothingThere(paths);
    const seen = await readBackup(options.file, () => undefined);
    checkRecipient(seen.header, options.secretKey);
    const text = Buffer.from(seen.header.enrolment).toString('utf8');
    const file = unverified('the enrolment in the backup', text);
    writeFileDurably(begunPath(paths), text);
    removeBegun(paths);
    if (seen.header.approvals.length > 0) writeFileDurably(paths.approvals, seen.header.approvals);
    return await (options.recoveryKey
      ? withoutTpm(options, seen, file, options.recoveryKey)
      : withTpm(options, seen, file));
  } finally {
    wipe(options.secretKey, options.recoveryKey);
    release();
  }
}

async function withTpm(
  options: RebuildOptions,
  start: BackupStart,
  file: UnverifiedEnrolment,
): Promise<RebuildResult> {
  const paths = options.paths.manager;
  const { kind, path } = file.enrolment.tpm;
  const platform = await openPlatform({ kind, path }, paths, options.log, false, options.tpmDeadlineMs);
  try {
    const { keys } = await released(options, platform, file);
    try {
      const counter = platform.tpm.anchorCounter(file.enrolment.tpm, keys.anchorAuth);
      return await make(options, start, file, keys, counter);
    } finally {
      keys.wipe();
    }
  } finally {
    await platform.close();
  }
}

async function released(options: RebuildOptions, { tpm }: Platform, file: UnverifiedEnrolment) {
  const paths = options.paths.manager;
  try {
    return await unlock(tpm, paths, file, readApprovals(paths));
  } catch (caught) {
    const error = ManagerError.from(caught);
    throw new ManagerError(
      error.code,
      `${error.message}. Where the backup is from before the last rotation of the root key, or the TPM is another one, ` +
        'use the recovery key: --recovery-key-file',
      { cause: error },
    );
  }
}

async function withoutTpm(
  options: RebuildOptions,
  start: BackupStart,
  file: UnverifiedEnrolment,
  recoveryKey: Uint8Array,
): Promise<RebuildResult> {
  const keys = hierarchy(unbox(recoveryKey, file), file.enrolment);
  try {
    const result = await make(options, start, file, keys, nobodyCounts());
    return { ...result, needsRecover: true };
  } finally {
    keys.wipe();
  }
}

async function make(
  options: RebuildOptions,
  start: BackupStart,
  file: UnverifiedEnrolment,
  keys: KeyHierarchy,
  counter: AnchorCounter,
): Promise<RebuildResult> {
  const {
    paths: { manager: paths },
    log,
  } = options;
  if (!bytesEqual(start.header.signer, keys.backupKey.publicKey)) {
    throw new ManagerError(
      'wrong-manager',
      'this backup was not made by the installation whose enrolment is in it',
    );
  }
  const { keyId: id, auditKey: key } = keys.current;
  const audit = await createAuditLog(paths.audit, { id, key });
  const { storeSandbox: sandbox } = options;
  try {
    return await withLmdbStore({ directory: paths.store, create: true, sandbox, log }, async (raw) => {
      const store = await createAnchoredStore(raw, {
        keys,
        counter,
        windowMs: 3_600_000,
        log,
        auditHead: () => audit.head,
      });
      const now = Date.now();
      await createTrustStore(keys, store, options.toolstackKey, BigInt(now));
      await store.write(ACCEPTANCE_KEY, 0, acceptanceRecord(now));
      // Twice: the lost disk may say one more than its TPM had counted, and must be an old one from now on.
      const vtpms = await fill(options, store, audit, keys, store.stated.counter + 2n);
      await store.count();
      await store.count();
      await store.close();
      barrier('rebuild.counted');
      finishRebuild(paths);
      barrier('rebuild.enrolled');
      const { managerId, storeId, tpm } = file.enrolment;
      const { kind, path, manufacturer, firmwareVersion } = tpm;
      return {
        managerId,
        storeId,
        tpm: { kind, path, manufacturer, firmwareVersion },
        pcrSelection: tpm.root.pcrSelection,
        vtpms,
        needsRecover: false,
      };
    });
  } finally {
    await audit.close();
  }
}

/** Writes under way at a time: they share commits. */
const PARALLEL = 64;

async function fill(
  { file, secretKey }: RebuildOptions,
  store: AnchoredStore,
  audit: AuditLog,
  keys: KeyHierarchy,
  count: bigint,
): Promise<RebuildResult['vtpms']> {
  const actor = { uid: process.getuid?.() ?? 0 };
  const vtpms: RebuildResult['vtpms'][number][] = [];
  const running = new Parallel(PARALLEL);
  try {
    await readBackup(file, async (start, entry) => {
      const record = recordOf(keys, secretKey, start, entry, count);
      if (!record) return;
      const { kind, vmUuid, generation, epoch } = record.header;
      const vtpm = uuidToText(entry.parsed.vtpmUuid);
      vtpms.push({
        id: vtpm,
        vmUuid: uuidToText(vmUuid),
        generation,
        kind: KIND_NAMES[kind],
      });
      const backup = start.digest.toString('hex').slice(0, 32);
      const written = audit
        .append({ actor, action: 'restore', verdict: 'done', vtpm, generation, epoch, facts: { backup } })
        .then(() => store.write(vtpmKey(vtpm), 0, encodeRecord(keys, record)));
      await running.add(written);
      barrier('rebuild.entry');
    });
    await running.done();
  } finally {
    await running.settled();
  }
  return vtpms;
}

function recordOf(
  keys: KeyHierarchy,
  secretKey: Uint8Array,
  start: BackupStart,
  entry: ReadEntry,
  count: bigint,
): VtpmRecord | undefined {
  const { parsed } = entry;
  if (parsed.kind !== 'LIVE') return restoredTombstone(keys, parsed);
  if (entry.envelope.length === 0) return undefined;
  const content = openEntry(secretKey, start, entry);
  try {
    const { permanent } = parse('BackupContent', content, 'a state');
    return restoredRecord(keys, parsed, permanent, undefined, count);
  } finally {
    wipe(content);
  }
}

/** Where the recovery key stands in for the TPM. */
function nobodyCounts(): AnchorCounter {
  let value = 0n;
  return { read: async () => value, increment: async () => ++value };
}

/** The enrolment to come: while it is here, what else there is was begun by a rebuild. */
function begunPath({ enrolment }: Paths['manager']): string {
  return `${enrolment}.rebuild`;
}

function finishRebuild(paths: Paths['manager']): void {
  renameSync(begunPath(paths), paths.enrolment);
  syncDirectory(paths.directory);
}

function checkNothingThere(paths: Paths['manager']): void {
  const found = existsSync(paths.enrolment)
    ? paths.enrolment
    : existsSync(begunPath(paths))
      ? undefined
      : [unfinishedPath(paths), paths.store, paths.audit].find((path) => !isMissingOrEmpty(path));
  if (found === undefined) return;
  throw new ManagerError(
    'already-initialised',
    `${found} exists: a rebuild is for an installation whose disk is lost. Where this one starts, use vtpmctl restore; ` +
      'where it cannot be used any more, move it away first',
  );
}

function removeBegun(paths: Paths['manager']): void {
  rmSync(paths.store, { recursive: true, force: true });
  const stem = basename(paths.audit, '.log');
  for (const name of readdirSync(dirname(paths.audit))) {
    if (name.startsWith(`${stem}.`)) rmSync(join(dirname(paths.audit), name), { recursive: true });
  }
  syncDirectory(paths.directory);
}
