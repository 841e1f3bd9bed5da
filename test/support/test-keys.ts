import { randomBytes } from 'node:crypto';
import { createLogger } from 'vtpm-common';
import { deriveRootKeys, KeyHierarchy, newInstallationSecrets } from 'vtpm-manager/keys/index';
import { Census } from 'vtpm-manager/ownership/census';
import type { AnchorOptions } from 'vtpm-manager/store/index';
import { MemoryCounter } from './memory-counter.js';

export function testKeys(
  storeId: Uint8Array = randomBytes(16),
  rootKey: Uint8Array = randomBytes(32),
): KeyHierarchy {
  return new KeyHierarchy(deriveRootKeys(rootKey, storeId, 1), newInstallationSecrets());
}

/** For a registry whose log and erasures are not what a test is about. */
export const unwatched = {
  audit: { append: async () => ({ length: 0n, digest: Buffer.alloc(32) }) },
  erasure: { note: async () => undefined },
  census: new Census(),
};

/** Nothing is counted unless asked for. */
export function anchorOptions(keys: KeyHierarchy, counter = new MemoryCounter()): AnchorOptions {
  return {
    keys,
    counter,
    windowMs: 3_600_000,
    log: createLogger('test', { 'log-level': 'silent', 'log-format': 'json' }),
    auditHead: () => ({ length: 0n, digest: Buffer.alloc(32) }),
  };
}
