import { randomBytes } from 'node:crypto';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type BackupSource, writeBackup } from 'vtpm-manager/backup/write';
import type { KeyHierarchy } from 'vtpm-manager/keys/index';
import { restoredRecord, restoredTombstone, type VtpmRecord } from 'vtpm-manager/records/index';
import { type BoxKeyPair, boxKeyPair, uuidToBytes } from 'vtpm-proto';
import { testKeys } from '../support/test-keys.js';

/** A record at a generation, with a state of these bytes; a tombstone where there are none. */
export function recordAt(
  keys: KeyHierarchy,
  id: string,
  generation: bigint,
  permanent: Uint8Array | undefined,
): VtpmRecord {
  const copy = {
    vtpmUuid: uuidToBytes(id),
    vmUuid: randomBytes(16),
    kind: permanent ? ('LIVE' as const) : ('RETIRED' as const),
    generation,
    epoch: 3n,
    marks: [],
    libtpmsVersion: '0.9.2',
    savedAt: 1000n,
    createdAt: 500n,
  };
  if (!permanent) return restoredTombstone(keys, copy);
  return restoredRecord(keys, copy, permanent, undefined, 1n);
}

/** Backups of one installation, in a directory of their own. */
export class BackupDesk {
  readonly directory = mkdtempSync(join(tmpdir(), 'vtpm-backup-'));
  readonly keys = testKeys();
  readonly operator: BoxKeyPair = boxKeyPair();
  readonly #records = new Map<string, VtpmRecord>();
  #files = 0;

  put(id: string, generation: bigint, permanent: Uint8Array | undefined): void {
    this.#records.set(id, recordAt(this.keys, id, generation, permanent));
  }

  async make(changes: Partial<BackupSource> = {}): Promise<Buffer> {
    const chunks: Buffer[] = [];
    const source: BackupSource = {
      keys: this.keys,
      ids: [...this.#records.keys()].sort(),
      recipient: this.operator.publicKey,
      anchor: { root: Buffer.alloc(32, 7), counter: 12n },
      enrolment: Buffer.from('{}'),
      approvals: Buffer.alloc(0),
      backupId: randomBytes(16),
      record: async (id) => this.#records.get(id),
      ...changes,
    };
    for await (const chunk of writeBackup(source)) chunks.push(chunk);
    return Buffer.concat(chunks);
  }

  file(bytes: Uint8Array): string {
    const path = join(this.directory, `${++this.#files}.vtpm`);
    writeFileSync(path, bytes);
    return path;
  }

  clear(): void {
    rmSync(this.directory, { recursive: true, force: true });
  }
}

/** Where the parts of a backup begin, and its end. */
export function partsOf(bytes: Buffer): number[] {
  const starts: number[] = [];
  // Behind the magic and the format number.
  for (let at = 19; at < bytes.length; at += 5 + bytes.readUInt32BE(at + 1)) starts.push(at);
  return [...starts, bytes.length];
}
