import { createHmac, timingSafeEqual } from 'node:crypto';
import { existsSync, readdirSync, readFileSync, renameSync, statSync } from 'node:fs';
import { dirname } from 'node:path';
import { type Paths, syncDirectory, writeFileDurably } from 'vtpm-common';
import { ManagerError } from './error.js';
import type { RecoveryBox } from './recovery-key.js';
import type { NvIndexRef, RootGeneration, RootTpmEnrolment } from './root-tpm/index.js';

export const ENROLMENT_FORMAT = 2;

/**
 * What init wrote down of this installation: which TPM, which store, who the manager is. It holds no secret. The mac is
 * under a key from the root key, so that whoever edits the file is found out once the TPM has released that key.
 */
export interface Enrolment {
  readonly format: number;
  readonly createdAt: string;
  /** The manager's box public key, hex of 32 bytes. */
  readonly managerId: string;
  /** Hex of 16 bytes. */
  readonly storeId: string;
  readonly tpm: RootTpmEnrolment;
  /** Base64: the secrets that stay over rotations, under the root key (keys/keyring.ts). */
  readonly keyring: string;
  readonly recovery: RecoveryBox;
  /** Generations of the root key that nothing needs any more and that are still to be erased in the TPM. */
  readonly erase: readonly RootGeneration[];
  /** NV indices that a rotation was about to make: what is left of one that did not come to its next enrolment. */
  readonly planned: readonly NvIndexRef[];
}

/**
 * The enrolment of an init that is not done, or an uninstall: nothing starts from it. It says what is in the TPM, so that
 * an uninstall can take it out wherever the one or the other was interrupted.
 */
export function unfinishedPath(paths: Paths['manager']): string {
  return `${paths.enrolment}.unfinished`;
}

/** Before the store is made. @param macKey 32 bytes */
export function writeUnfinished(paths: Paths['manager'], enrolment: Enrolment, macKey: Uint8Array): void {
  write(unfinishedPath(paths), enrolment, macKey);
}

/** Last in init: an init that was interrupted leaves nothing that starts. */
export function finishEnrolment(paths: Paths['manager']): void {
  move(unfinishedPath(paths), paths.enrolment);
}

/**
 * The enrolment with the next generation of the root key, while a rotation is under way: beside the one in force, since
 * the store is under both.
 */
export function nextPath(paths: Paths['manager']): string {
  return `${paths.enrolment}.next`;
}

export function writeNext(paths: Paths['manager'], next: Enrolment, macKey: Uint8Array): void {
  write(nextPath(paths), next, macKey);
}

/** undefined where no rotation is under way. @throws ManagerError `store-corrupt`, `newer-format` */
export function readNext(paths: Paths['manager']): UnverifiedEnrolment | undefined {
  const path = nextPath(paths);
  return existsSync(path) ? unverified(path, readFileSync(path, 'utf8')) : undefined;
}

/** The store is under the next generation alone. */
export function adoptNext(paths: Paths['manager']): void {
  move(nextPath(paths), paths.enrolment);
}

/** @param macKey of the generation that the enrolment names */
export function rewriteEnrolment(paths: Paths['manager'], enrolment: Enrolment, macKey: Uint8Array): void {
  write(paths.enrolment, enrolment, macKey);
}

function write(path: string, enrolment: Enrolment, macKey: Uint8Array): void {
  const file = { enrolment, mac: enrolmentMac(enrolment, macKey).toString('hex') };
  writeFileDurably(path, `${JSON.stringify(file, undefined, 2)}\n`);
}

/** First in uninstall: nothing starts any more. */
export function markUnfinished(paths: Paths['manager']): void {
  move(paths.enrolment, unfinishedPath(paths));
}

/** @throws ManagerError `store-corrupt`, `newer-format` */
export function readUnfinished(paths: Paths['manager']): Enrolment | undefined {
  const path = unfinishedPath(paths);
  return existsSync(path) ? parse(path, readFileSync(path, 'utf8')).enrolment : undefined;
}

/** What the file says, not verified, whatever there is of the store. @throws as readEnrolment, but `store-missing` */
export function readEnrolmentText(paths: Paths['manager']): { readonly enrolment: Enrolment } {
  return parse(paths.enrolment, readText(paths));
}

function move(from: string, to: string): void {
  renameSync(from, to);
  syncDirectory(dirname(to));
}

/** An enrolment that was read and not yet verified: the key for that comes from the TPM it names. */
export interface UnverifiedEnrolment {
  readonly enrolment: Enrolment;
  /** @throws ManagerError `store-corrupt` where the file is not the one that init wrote */
  verify(macKey: Uint8Array): void;
}

/** @throws ManagerError `not-initialised`, `store-missing`, `store-corrupt`, `newer-format` */
export function readEnrolment(paths: Paths['manager']): UnverifiedEnrolment {
  const text = readText(paths);
  const file = unverified(paths.enrolment, text);
  if (isMissingOrEmpty(paths.store)) {
    throw new ManagerError(
      'store-missing',
      `${paths.enrolment} names an installation but its store ${paths.store} is missing or empty; restore it from a backup. A new store is never made by itself`,
    );
  }
  return file;
}

/** What an enrolment file says. @param path for messages @throws ManagerError `store-corrupt`, `newer-format`, `older-format` */
export function unverified(path: string, text: string): UnverifiedEnrolment {
  const file = parse(path, text);
  return {
    enrolment: file.enrolment,
    verify: (macKey) => {
      const expected = enrolmentMac(file.enrolment, macKey);
      const mac = Buffer.from(file.mac, 'hex');
      if (mac.length !== expected.length || !timingSafeEqual(mac, expected)) {
        throw unreadable(path, 'was changed since it was written');
      }
    },
  };
}

/** @throws ManagerError `already-initialised`, also where an init did not finish or an enrolment was lost */
export function checkNotEnrolled(paths: Paths['manager']): void {
  if (existsSync(paths.enrolment)) {
    throw new ManagerError(
      'already-initialised',
      `${paths.enrolment} exists: this installation is initialised. Start it, or choose another --home`,
    );
  }
  if (existsSync(unfinishedPath(paths))) {
    throw new ManagerError(
      'already-initialised',
      `${unfinishedPath(paths)} exists: an init that did not finish, or an uninstall. Clean up with vtpmctl uninstall, then run init again`,
    );
  }
  const leftovers = [paths.store, paths.softtpm, paths.audit].filter((path) => !isMissingOrEmpty(path));
  if (leftovers.length > 0) {
    throw new ManagerError(
      'already-initialised',
      `there is no ${paths.enrolment}, but ${leftovers.join(' and ')}: an init that did not finish, or an enrolment that was lost. ` +
        'If vTPMs were ever saved here, restore the enrolment from a backup; if not, remove what is left and run init again',
    );
  }
}

function readText(paths: Paths['manager']): string {
  try {
    return readFileSync(paths.enrolment, 'utf8');
  } catch (cause) {
    if ((cause as NodeJS.ErrnoException).code !== 'ENOENT') {
      throw unreadable(paths.enrolment, `cannot be read (${(cause as Error).message})`);
    }
  }
  if (existsSync(unfinishedPath(paths))) {
    throw new ManagerError(
      'not-initialised',
      `${paths.directory} is left by an init that did not finish, or an uninstall; vtpmctl uninstall removes the rest`,
    );
  }
  if (!isMissingOrEmpty(paths.store)) {
    throw new ManagerError(
      'not-initialised',
      `there is a store ${paths.store} but no ${paths.enrolment}; restore the enrolment from a backup`,
    );
  }
  throw new ManagerError(
    'not-initialised',
    `${paths.directory} is not initialised; run: vtpmctl init (or vtpm-managerd init)`,
  );
}

interface EnrolmentFile {
  readonly enrolment: Enrolment;
  readonly mac: string;
}

function parse(path: string, text: string): EnrolmentFile {
  let file: Partial<EnrolmentFile> | null;
  try {
    file = JSON.parse(text) as Partial<EnrolmentFile> | null;
  } catch {
    throw unreadable(path, 'is not JSON');
  }
  const { enrolment, mac } = file ?? {};
  const format: unknown = enrolment?.format;
  if (typeof format === 'number' && format > ENROLMENT_FORMAT) {
    throw new ManagerError(
      'newer-format',
      `${path} has format ${format}, this version knows ${ENROLMENT_FORMAT}; run the version that wrote it`,
    );
  }
  if (typeof format === 'number' && format < ENROLMENT_FORMAT) {
    throw new ManagerError(
      'older-format',
      `${path} has format ${format}, this version knows ${ENROLMENT_FORMAT} and cannot convert it; run the version that wrote it`,
    );
  }
  const isWhole =
    enrolment !== undefined &&
    format === ENROLMENT_FORMAT &&
    isHex(mac, 32) &&
    isHex(enrolment.managerId, 32) &&
    isHex(enrolment.storeId, 16) &&
    typeof enrolment.tpm === 'object' &&
    enrolment.tpm !== null;
  if (!isWhole) throw unreadable(path, 'is not an enrolment');
  return { enrolment, mac: mac as string };
}

function isHex(value: unknown, bytes: number): boolean {
  return typeof value === 'string' && value.length === 2 * bytes && /^[0-9a-f]*$/.test(value);
}

export function isMissingOrEmpty(path: string): boolean {
  const found = statSync(path, { throwIfNoEntry: false });
  return !found || (found.isDirectory() && readdirSync(path).length === 0);
}

/** Over the file's own text form: parsing and writing keeps the order of keys. */
function enrolmentMac(enrolment: Enrolment, macKey: Uint8Array): Buffer {
  return createHmac('sha256', macKey)
    .update('vtpm.v1 enrolment\0')
    .update(JSON.stringify(enrolment))
    .digest();
}

function unreadable(path: string, what: string): ManagerError {
  return new ManagerError('store-corrupt', `${path} ${what}; restore it from a backup`);
}
