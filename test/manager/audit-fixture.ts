import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import {
  type AuditEvent,
  type AuditHead,
  type AuditLog,
  type AuditLogOptions,
  createAuditLog,
  type OpenedAuditLog,
  openAuditLog,
} from 'vtpm-manager/audit/index';

const VTPM = '6e6f7468-696e-4720-8065-766572676f65';

/** One audit log in a directory of its own. */
export class AuditFixture {
  readonly directory = mkdtempSync(join(tmpdir(), 'vtpm-audit-'));
  readonly path = join(this.directory, 'audit.log');
  readonly key = { id: 1, key: randomBytes(32) };
  readonly #open: AuditLog[] = [];

  async create(options?: AuditLogOptions): Promise<AuditLog> {
    const log = await createAuditLog(this.path, this.key, options);
    this.#open.push(log);
    return log;
  }

  async open(
    anchored: AuditHead,
    options?: AuditLogOptions,
    keys = { current: this.key },
  ): Promise<OpenedAuditLog> {
    const opened = await openAuditLog(this.path, keys, anchored, options);
    this.#open.push(opened.log);
    return opened;
  }

  /** @returns the heads after each of `count` entries in a new log, which is closed */
  async write(count: number, options?: AuditLogOptions): Promise<AuditHead[]> {
    const log = await this.create(options);
    const heads = await appendAll(log, count);
    await log.close();
    return heads;
  }

  /** Lines of the newest file, without their newlines. */
  lines(path = this.path): string[] {
    const text = readFileSync(path, 'latin1');
    assert.ok(text === '' || text.endsWith('\n'), 'the last line is whole');
    return text.split('\n').slice(0, -1);
  }

  put(lines: readonly string[], path = this.path): void {
    writeFileSync(path, lines.map((line) => `${line}\n`).join(''), 'latin1');
  }

  async destroy(): Promise<void> {
    for (const log of this.#open) await log.close();
    rmSync(this.directory, { recursive: true, force: true });
  }
}

export function load(generation: bigint, more: Partial<AuditEvent> = {}): AuditEvent {
  return {
    actor: { worker: '00ff00ff' },
    action: 'load',
    verdict: 'done',
    vtpm: VTPM,
    epoch: 1n,
    generation,
    ...more,
  };
}

/** One after the other, so that small files are closed between them. */
export async function appendAll(log: AuditLog, count: number): Promise<AuditHead[]> {
  const heads: AuditHead[] = [];
  for (let i = 0; i < count; i++) heads.push(await log.append(load(BigInt(i))));
  return heads;
}

export async function collect(lines: AsyncIterable<string>): Promise<string> {
  let text = '';
  for await (const part of lines) text += part;
  return text;
}
