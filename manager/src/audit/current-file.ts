import { constants, renameSync, writeSync } from 'node:fs';
import { type FileHandle, open } from 'node:fs/promises';
import { dirname } from 'node:path';
import { barrier, syncDirectory } from 'vtpm-common';
import { ManagerError } from '../error.js';
import { closedPath } from './segments.js';

/** The file that is appended to, and the one after it. Its content is lines; which, is none of its business. */
export class CurrentFile {
  private constructor(
    private readonly path: string,
    /** Absent between closing a file and beginning the next. */
    private handle: FileHandle | undefined,
    private bytes: number,
    private segment: number,
  ) {}

  /** @throws ManagerError `already-initialised` where there is one, `store-full`, `home-unwritable` */
  static async create(path: string): Promise<CurrentFile> {
    const file = CurrentFile.closed(path, 1);
    await file.#begin();
    return file;
  }

  /** One that does not exist yet. */
  static closed(path: string, segment: number): CurrentFile {
    return new CurrentFile(path, undefined, 0, segment);
  }

  /**
   * Opens the file and makes durable what is in it.
   * @param keep bytes; what comes after is cut off
   */
  static async open(path: string, segment: number, keep?: number): Promise<CurrentFile> {
    // Never creates, and appends whatever happens to the file: an append-only attribute is fine with it.
    const handle = await open(path, constants.O_WRONLY | constants.O_APPEND);
    try {
      if (keep !== undefined) await handle.truncate(keep);
      await handle.datasync();
      syncDirectory(dirname(path));
      return new CurrentFile(path, handle, (await handle.stat()).size, segment);
    } catch (error) {
      await handle.close();
      throw error;
    }
  }

  get size(): number {
    return this.bytes;
  }

  /** Number of the file. */
  get number(): number {
    return this.segment;
  }

  /**
   * Durable when it resolves.
   * @throws ManagerError `store-full`: nothing was written, later appends may work. After anything else it is not known
   * what the file holds
   */
  async append(lines: Uint8Array): Promise<void> {
    const handle = this.handle ?? (await this.#begin());
    try {
      barrier('audit.write');
      // Into the kernel's memory alone, which is sooner done than another thread is asked for it.
      for (let written = 0; written < lines.length; ) written += writeSync(handle.fd, lines, written);
      barrier('audit.written');
      await handle.datasync();
      barrier('audit.synced');
      this.bytes += lines.length;
    } catch (cause) {
      const error = this.#failure(cause);
      if (error.code === 'store-full') await this.#cutBack(handle);
      throw error;
    }
  }

  /** Closes the file under its number. The next append begins another. */
  async rotate(): Promise<void> {
    const { handle, path } = this;
    try {
      renameSync(path, closedPath(path, this.segment));
      this.handle = undefined;
      this.bytes = 0;
      this.segment++;
      barrier('audit.rotated');
      await handle?.close();
      syncDirectory(dirname(path));
    } catch (cause) {
      throw this.#failure(cause);
    }
  }

  async close(): Promise<void> {
    await this.handle?.close();
    this.handle = undefined;
  }

  async #begin(): Promise<FileHandle> {
    const { path } = this;
    try {
      this.handle = await open(path, 'ax', 0o600);
      syncDirectory(dirname(path));
      return this.handle;
    } catch (cause) {
      if ((cause as NodeJS.ErrnoException).code !== 'EEXIST') throw this.#failure(cause);
      throw new ManagerError(
        'already-initialised',
        `there is an audit log ${path} already; it is never begun anew`,
        { cause },
      );
    }
  }

  async #cutBack(handle: FileHandle): Promise<void> {
    try {
      await handle.truncate(this.bytes);
      await handle.datasync();
    } catch (cause) {
      throw new ManagerError(
        'internal',
        `the audit log ${this.path} ends with a part of an entry, which cannot be cut off: make room on its disk and start again`,
        { cause },
      );
    }
  }

  #failure(cause: unknown): ManagerError {
    // A write to an open file names no path of itself.
    if (cause instanceof Error) (cause as NodeJS.ErrnoException).path ??= this.path;
    return ManagerError.from(cause, `the audit log ${this.path} cannot be written; start again`);
  }
}
