import { randomBytes } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { request } from 'node:http';
import { bootId, monotonicMs } from 'vtpm-common';
import {
  encode,
  type MigrateMode,
  type MigrateOrder,
  signingKeyFromSeed,
  signMigrateOrder,
  uuidToBytes,
} from 'vtpm-proto';
import type { Installation } from './installation.js';
import type { Host } from './two-hosts.js';

/** A line of the supervisor's answer, and when it came (performance.now). */
export interface ToldProgress {
  readonly phase: string;
  readonly bytesSent: number;
  readonly downtimeUs: number;
  readonly elapsedUs: number;
  readonly reason: string;
  readonly message: string;
  readonly checks: readonly { readonly name: string; readonly detail: string }[];
  readonly at: number;
}

export interface MigrateOptions {
  readonly mode?: MigrateMode;
  readonly dryRun?: boolean;
  /** Spoils an order that is good otherwise. */
  readonly changes?: Partial<MigrateOrder>;
  readonly onProgress?: (progress: ToldProgress) => void;
}

/** It was refused, or its end was not told. */
export class NotMigrated extends Error {
  override readonly name = 'NotMigrated';

  constructor(
    readonly code: string,
    message: string,
  ) {
    super(`${code}: ${message}`);
  }
}

/** As a toolstack does it, which keeps the key and needs no program for it. @returns each line, the last one last */
export async function migrate(
  from: Host,
  to: Host,
  name: string,
  options: MigrateOptions = {},
): Promise<ToldProgress[]> {
  const order = await orderFor(from, to, name, options);
  const lines: ToldProgress[] = [];
  await streamed(from.installation, `/vtpms/${name}/migrate`, { order: order.toString('base64') }, (line) => {
    const progress = { ...(JSON.parse(line) as Omit<ToldProgress, 'at'>), at: performance.now() };
    lines.push(progress);
    options.onProgress?.(progress);
  });
  if (lines.length === 0) throw new NotMigrated('broken-off', 'the supervisor said nothing');
  return lines;
}

/** @throws NotMigrated where it ended otherwise @returns the last line */
export async function migrated(
  from: Host,
  to: Host,
  name: string,
  options: MigrateOptions = {},
): Promise<ToldProgress> {
  const last = (await migrate(from, to, name, options)).at(-1) as ToldProgress;
  const { phase, reason, message } = last;
  if (phase === 'COMMITTED') return last;
  throw new NotMigrated(reason || phase, `${phase}: ${message}`);
}

async function orderFor(
  from: Host,
  to: Host,
  name: string,
  { mode, dryRun = false, changes = {} }: MigrateOptions,
): Promise<Buffer> {
  const { installation } = from;
  const key = signingKeyFromSeed(readFileSync(installation.paths.toolstack.key));
  const { body: vtpm } = await installation.supervisord('GET', `/vtpms/${name}`);
  const [{ body: health }, { body: saved }] = await Promise.all([
    installation.admin('GET', '/health'),
    installation.admin('GET', `/vtpms/${vtpm.id}`),
  ]);
  const signed = signMigrateOrder(key, {
    format: 1,
    managerId: Buffer.from(String(health.managerId), 'hex'),
    toolstackKey: key.publicKey,
    vtpmUuid: uuidToBytes(String(vtpm.id)),
    vmUuid: uuidToBytes(String(vtpm.vmUuid)),
    destination: Buffer.from(to.hostId, 'hex'),
    expectedEpoch: BigInt(Number(saved.epoch)),
    leastGeneration: BigInt(Number(saved.generation)),
    migrationId: randomBytes(16),
    bootId: bootId(),
    expiresAtMonotonicMs: monotonicMs() + 60_000n,
    mode: mode ?? (vtpm.state === 'running' ? 'LIVE' : 'OFFLINE'),
    dryRun,
    description: Buffer.from(String(vtpm.description)),
    ...changes,
  });
  return encode('SignedMigrateOrder', signed);
}

/** Hears each line of the answer as it comes. @throws NotMigrated where it is a refusal */
function streamed(
  installation: Installation,
  path: string,
  body: object,
  hear: (line: string) => void,
): Promise<void> {
  const text = JSON.stringify(body);
  const headers = { 'content-type': 'application/json', 'content-length': Buffer.byteLength(text) };
  const options = { socketPath: installation.paths.supervisor.socket, method: 'POST', path, headers };
  return new Promise((resolve, reject) => {
    const sent = request({ ...options, agent: false }, (response) => {
      let pending = '';
      response.setEncoding('utf8').on('data', (chunk: string) => {
        pending += chunk;
        if (response.statusCode !== 200) return;
        const lines = pending.split('\n');
        pending = lines.pop() ?? '';
        for (const line of lines) hear(line);
      });
      response.on('end', () => {
        if (response.statusCode === 200) return resolve();
        const { error } = JSON.parse(pending) as { error: { code: string; message: string } };
        reject(new NotMigrated(error.code, error.message));
      });
      // A supervisor that is killed ends the answer short of its end; what it said counts.
      response.on('error', () => resolve());
    });
    sent.on('error', reject);
    sent.end(text);
  });
}
