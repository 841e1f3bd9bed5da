import { chmodSync, cpSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { gunzipSync } from 'node:zlib';
import { REPOSITORY } from '../support/installation.js';

/** A directory for each version whose files are kept; make-fixture.ts says what is in it. */
export const FIXTURES = join(REPOSITORY, 'test/fixtures/formats');
/** Below the home, where LMDB keeps everything; the fixture has it compressed. */
export const STORE_DATA = 'manager/store/data.mdb';

/** What a guest knows of its TPM when the fixture was made. */
export interface Seen {
  /** Fingerprint of a key that only this TPM's endorsement seed gives. */
  readonly endorsement: string;
  /** Of a key that it keeps. */
  readonly key: string;
  readonly counter: number;
}

export function versions(): string[] {
  return readdirSync(FIXTURES, { withFileTypes: true })
    .filter((item) => item.isDirectory())
    .map(({ name }) => name)
    .sort();
}

export function seenIn(version: string): Seen {
  return JSON.parse(readFileSync(join(FIXTURES, version, 'seen.json'), 'utf8')) as Seen;
}

/** A copy of the home of that version, which may be started. */
export function copyHome(version: string, home: string): void {
  cpSync(join(FIXTURES, version, 'home'), home, { recursive: true });
  const packed = join(home, `${STORE_DATA}.gz`);
  writeFileSync(join(home, STORE_DATA), gunzipSync(readFileSync(packed)));
  rmSync(packed);
  // A checkout has the modes that its user's umask makes.
  for (const name of ['', ...(readdirSync(home, { recursive: true }) as string[])]) {
    const path = join(home, name);
    chmodSync(path, statSync(path).isDirectory() ? 0o700 : 0o600);
  }
}
