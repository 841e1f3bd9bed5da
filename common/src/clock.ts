import { readFileSync } from 'node:fs';

/** Milliseconds of CLOCK_MONOTONIC: the same in every process of this boot, untouched by a stepped wall clock. */
export function monotonicMs(): bigint {
  return process.hrtime.bigint() / 1_000_000n;
}

let cached: Buffer | undefined;

/** 16 bytes that name this boot of the host. */
export function bootId(): Buffer {
  cached ??= Buffer.from(
    readFileSync('/proc/sys/kernel/random/boot_id', 'utf8').trim().replaceAll('-', ''),
    'hex',
  );
  return cached;
}
