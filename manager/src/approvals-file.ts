import { existsSync, readFileSync } from 'node:fs';
import { type Approval, readApproval, TpmError } from 'tpm2-ts-bindings';
import { type Paths, writeFileDurably } from 'vtpm-common';
import { ManagerError } from './error.js';

/**
 * The authority's approvals, in a file of their own: they are needed before anything can be decrypted. Each proves
 * itself by its signature, so that nobody gains by writing to the file; without it the host stays locked.
 */
interface ApprovalsFile {
  readonly format: 1;
  readonly approvals: readonly Approval[];
}

/** @throws ManagerError `store-corrupt`, `newer-format` */
export function readApprovals({ approvals: path }: Paths['manager']): readonly Approval[] {
  if (!existsSync(path)) return [];
  const damaged = (cause?: unknown): ManagerError =>
    new ManagerError(
      'store-corrupt',
      `${path} cannot be read as approvals; restore it, or remove it and give the signed approvals again: vtpmctl platform approve FILE`,
      { cause },
    );
  try {
    const file = JSON.parse(readFileSync(path, 'utf8')) as Partial<ApprovalsFile> | null;
    if (typeof file?.format === 'number' && file.format > 1) {
      throw new ManagerError(
        'newer-format',
        `${path} has format ${file.format}, this version knows 1; run the version that wrote it`,
      );
    }
    if (!Array.isArray(file?.approvals)) throw damaged();
    return file.approvals.map(readApproval);
  } catch (error) {
    if (error instanceof SyntaxError || error instanceof TpmError) throw damaged(error);
    throw error;
  }
}

export function writeApprovals({ approvals: path }: Paths['manager'], approvals: readonly Approval[]): void {
  const file: ApprovalsFile = { format: 1, approvals };
  writeFileDurably(path, `${JSON.stringify(file, undefined, 2)}\n`);
}
